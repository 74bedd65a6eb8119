#pragma once
#include <cstdint>

#include "sela/candidates.h"
#include "sela/dispatch.h"

namespace sela {

/// Storage type of the logits.  Arithmetic is in double for float64 and in float for the others.
/// fixed16 (sela/logits.h): uint16 q stands for the logit -q, kFixedImpossible for -inf.
enum class LogitsType { float32 = 0, float16 = 1, bfloat16 = 2, float64 = 3, fixed16 = 4 };

/// Rows per block: sums over rows are in floating point inside a block, and blocks start at multiples of this, so the
/// bits of all results depend on neither threads nor scheduling.
constexpr int64_t kSinkhornRows = 128;

/// The same for the CUDA kernels: smaller, for there are more blocks at work.
constexpr int64_t kSinkhornCudaRows = 64;

/// Columns of which a pass knows one upper bound, see SinkhornPass::bounds.
constexpr int64_t kSinkhornChunk = 32;

/// Inputs of one fused pass over logits for potentials g = log beta (nats):
///   t[i, j] = scale * logits[i, j] + g[j];   lse[i] = log sum_j exp(t[i, j]);   p[i, j] = exp(t[i, j] - lse[i]).
/// All pointers are borrowed for the call.  On the GPU path every pointer is device memory.
///
/// A row is masked when it holds NaN or +inf, when all of it is -inf, or when scale * logits overflows to such a row; a
/// single -inf is legal and means p = 0.
struct SinkhornPass {
  const void* logits = nullptr;  ///< [rows, cols] row-major, elements of `type`
  LogitsType type = LogitsType::float32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  ///< elements from one row to the next, >= cols
  double scale = 1.0;  ///< > 0, finite; rounded to float unless type is float64
  /// [rows] what was subtracted from the rows before they were stored (sela/logits.h), or null.  lse, also that of
  /// `reference`, is that of the rows before: maxima_scale * maxima[i] larger.  Not for float64.
  const float* maxima = nullptr;
  double maxima_scale = 0.0;

  const double* potential = nullptr;   ///< [cols], finite; rounded to float unless type is float64
  const float* row_weights = nullptr;  ///< [rows], finite, >= 0, or null: all 1.  0 takes the row out of all sums
  double largest_weight = 1.0;         ///< >= every row weight; fixes the resolution of the integer sums
  /// Rows of the matrix that these are a part of, which also fixes it: the integer sums of parts can then be added.
  /// 0: these are all.
  int64_t rows_in_all = 0;
  /// [rows] log-sum-exp of an earlier pass (float, or double for float64), or null.  It saves the sweep for the row
  /// maximum; it need not be near: a row whose sum leaves the safe range is done again from its maximum.  NaN on the
  /// CPU: not known, this row's maximum is found first.
  const void* reference = nullptr;
  /// [rows, bounds_stride(cols)] or null: upper bounds of the logits in each chunk of kSinkhornChunk columns, bits of
  /// bfloat16, in the unit of the logits; CPU only.  They are written by a pass, and serve later ones over the same
  /// logits, at any scale and potential: chunks that the pass would find dead are not even read.  No bit of any result
  /// changes.  Neither written nor used for float64, and where cols is below kSinkhornBoundedColumns.
  uint16_t* bounds = nullptr;
  bool bounds_known = false;  ///< use them; else write them

  /// Entries of `bounds` from one row to the next.
  static int64_t bounds_stride(int64_t cols) { return (cols + kSinkhornChunk * 16 - 1) / (kSinkhornChunk * 16) * 16; }
};

/// Fewer columns than this are always read as a whole.
constexpr int64_t kSinkhornBoundedColumns = 256;

/// Outputs of one fused pass.  Arrays are allocated by the caller; null ones are not computed.
struct SinkhornSums {
  /// [cols] sum_i w[i] p[i, j] over unmasked rows, in units of `resolution` (see sinkhorn_resolution)
  int64_t* column_sums = nullptr;
  void* lse = nullptr;        ///< [rows] float, or double for float64; NaN for masked rows
  int32_t* labels = nullptr;  ///< [rows] argmax_j t[i, j], the lowest j of equals; -1 for masked rows
  double objective = 0.0;     ///< sum_i w[i] lse[i] over unmasked rows
  double weight = 0.0;        ///< sum_i w[i] over unmasked rows
  int64_t masked = 0;         ///< masked rows, of any weight
  int64_t live = 0;           ///< entries, counted by whole chunks, whose terms were computed (CPU)
};

/// Value of one unit of the integer column sums: a power of two, such that no sum over `rows` rows overflows.
double sinkhorn_resolution(int64_t rows, double largest_weight);
double sinkhorn_resolution(const SinkhornPass& pass);  ///< of all the rows

/// The reference that a pass goes by: none where the largest weight is so far from 1 (below 2e-8, above 1e17) that
/// weight / sum can leave float's range for a sum that is in the safe range, 1e-20 to 1e30.
const void* sinkhorn_reference(const SinkhornPass& pass);

/// Rows that a pass over a part of the rows reads together: as many as the dense form takes at once.
constexpr int64_t kSinkhornGroup = 4;

/// The rows that a pass reads: every `every`-th group of kSinkhornGroup rows, from the first one on.  Small groups,
/// because images mostly come sorted by class, and all classes should be seen.
struct SinkhornSample {
  int64_t every = 1;        ///< >= 1; 1 = all rows
  int64_t first_block = 0;  ///< number of the first block of this part: rows are counted over all parts

  /// Rows of a block of this part before the first one that is read; kSinkhornRows or more when there is none.
  int64_t start(int64_t block) const {
    const int64_t groups = (first_block + block) * (kSinkhornRows / kSinkhornGroup);
    return (every - groups % every) % every * kSinkhornGroup;
  }
  /// How many of the first `rows` rows of this part are read.
  int64_t count(int64_t rows) const {
    const int64_t left = rows - start(0), step = kSinkhornGroup * every;
    if (left <= 0) return 0;
    return left / step * kSinkhornGroup + (left % step < kSinkhornGroup ? left % step : kSinkhornGroup);
  }
};

/// One read of the logits on the CPU.  threads <= 0: all processors of this process.
/// The result is the same, bit by bit, for any number of threads; it differs in rounding between instruction sets.
/// lse and labels of rows outside `sample` are left as they are.  `candidates`, where not null, receives the entries
/// that count, and changes no bit of the other results.
/// `block_totals`, where not null: double [2, blocks], objective, then weight, of each block; 0 where none is read.
/// Throws std::invalid_argument for sizes, strides, scales or weights out of range.
void sinkhorn_pass_cpu(const SinkhornPass& pass, SinkhornSums& sums, int threads, Isa isa, SinkhornSample sample = {},
                       Candidates* candidates = nullptr, double* block_totals = nullptr);

/// Note [Exact totals]
/// Objective and weight come as one double for each block of rows.  Each is written as the sum of w[k] 2^(32 - 32 k)
/// with four integers w, in units of the largest row weight rounded up to a power of two; the words are added as int64,
/// over blocks and over parts of a matrix, in any order.  Beyond 2^76 units a block counts as 2^76, and so does one
/// that is not a number.
constexpr int kSinkhornWords = 4;

/// words[0 .. 4) of the objective and words[4 .. 8) of the weight, from block totals as a pass gives them, [2, blocks].
void sinkhorn_exact_totals(const double* totals, int64_t blocks, double largest_weight, int64_t* words);

/// What four words stand for, rounded once.
double sinkhorn_total(const int64_t* words, double largest_weight);

/// Device memory that a pass on CUDA needs beside its arrays: totals in doubles, scratch in bytes.
struct SinkhornWorkspace {
  int64_t totals = 0;
  int64_t scratch = 0;
};

/// candidates: they will be searched for, by the same pass and with the same scratch.
SinkhornWorkspace sinkhorn_workspace_cuda(const SinkhornPass& pass, SinkhornSample sample, bool candidates);

/// What a pass on CUDA notes for the search for candidates, see sinkhorn_candidates_cuda.
struct SinkhornMarks {
  double level = 0.0;         ///< nats, as Candidates::level; 0: no candidates
  int32_t* counts = nullptr;  ///< [rows read] candidates of each row; zero before
};

/// The same on the current CUDA device, in the order of `stream` (a cudaStream_t).  The outputs are device memory, with
/// the scalars in `totals`: double [2, blocks] (objective, then weight, of each block of kSinkhornCudaRows rows, to be
/// summed in order) and `masked`: int64 [1].  column_sums, totals and masked must be zero before.  `scratch`: as
/// sinkhorn_workspace_cuda says.  Rows of fixed16 must begin at multiples of 16 bytes.  Nothing waits for the device.
/// Throws std::invalid_argument for sizes out of range (2^31 rows and more are too many), std::runtime_error without
/// CUDA, on a device the build has no code for, and when the launch fails.
void sinkhorn_pass_cuda(const SinkhornPass& pass, const SinkhornSums& sums, double* totals, int64_t* masked,
                        void* scratch, void* stream, SinkhornSample sample = {}, SinkhornMarks marks = {});

/// Writes the candidates of such a pass (CSR, see sela/candidates.h; rows are those read).  It reads again only the 16
/// bytes around each of them.  `pass`, `sample`, `level` and `scratch` are those of the pass.
/// offsets: [rows read + 1], the sums of its counts; columns, values: [offsets[rows read]], written.
void sinkhorn_candidates_cuda(const SinkhornPass& pass, SinkhornSample sample, double level, const void* scratch,
                              const int64_t* offsets, int32_t* columns, float* values, void* stream);

}  // namespace sela
