// The reader and its index store: batches of paths and buffers in, tickets out.
#include "sela/reader.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/names.h"
#include "sela/jpeg.h"
#include "sela/planes.h"

namespace py = pybind11;

namespace sela {
namespace {

constexpr char kElsewhere[] = "the reader belongs to another process; make one in each process";
static_assert(sizeof(PlanarImage) == 184, "PlanarImage must match the numpy record PLANAR");
using Longs = py::array_t<int64_t, py::array::c_style>;

/// Memory of Python objects that is held for a while.
class Held {
 public:
  Held() = default;
  ~Held() {
    for (Py_buffer& buffer : buffers_) PyBuffer_Release(&buffer);
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  void reserve(size_t count) {
    buffers_.reserve(2 * count);
    paths_.reserve(count);
  }
  std::pair<const uint8_t*, size_t> bytes(py::handle object) {
    Py_buffer buffer;
    if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    buffers_.push_back(buffer);
    return {static_cast<const uint8_t*>(buffer.buf), static_cast<size_t>(buffer.len)};
  }
  const char* path(py::handle object) {
    py::object encoded = py::reinterpret_steal<py::object>(PyUnicode_EncodeFSDefault(object.ptr()));
    if (!encoded) throw py::error_already_set();
    const char* text = PyBytes_AS_STRING(encoded.ptr());
    if (std::strlen(text) != static_cast<size_t>(PyBytes_GET_SIZE(encoded.ptr())))
      throw std::invalid_argument("items: expected paths without null characters");
    paths_.push_back(std::move(encoded));
    return text;
  }
  void keep(py::object object) { objects_.push_back(std::move(object)); }

 private:
  std::vector<Py_buffer> buffers_;
  std::vector<py::object> paths_, objects_;
};

/// A batch on its way, and everything that it reads and writes.
class ReadTicket {
 public:
  ReadTicket(std::shared_ptr<Reader> reader, std::shared_ptr<ReadBatch> batch, std::unique_ptr<Held> held)
      : reader_(std::move(reader)), batch_(std::move(batch)), held_(std::move(held)) {}
  ~ReadTicket() {
    if (reader_->elsewhere()) return;  // nobody works on it in this process
    batch_->cancel();
    if (batch_->done()) return;
    const py::gil_scoped_release unlocked;
    while (!Reader::wait(*batch_, 1000)) {
    }
  }
  ReadTicket(const ReadTicket&) = delete;
  ReadTicket& operator=(const ReadTicket&) = delete;

  bool wait(int milliseconds) {
    if (reader_->elsewhere()) throw std::runtime_error(kElsewhere);
    const py::gil_scoped_release unlocked;
    return Reader::wait(*batch_, milliseconds);
  }

 private:
  std::shared_ptr<Reader> reader_;
  std::shared_ptr<ReadBatch> batch_;
  std::unique_ptr<Held> held_;
};

std::shared_ptr<Reader> make_reader(const std::vector<AugmentOptions>& options,
                                    const std::vector<EffectOptions>& effects, int threads, int32_t channels,
                                    bool exact, bool exif, bool reduce, const std::string& dtype, bool channels_last,
                                    int64_t max_pixels, int64_t cache_bytes,
                                    const std::optional<std::shared_ptr<IndexStore>>& store, const std::string& isa) {
  if (options.size() != effects.size()) throw std::invalid_argument("Reader: options and effects differ in length");
  ReaderOptions o;
  for (size_t v = 0; v < options.size(); ++v) o.views.push_back({options[v], effects[v]});
  o.threads = threads;
  o.channels = channels;
  o.exact = exact;
  o.exif = exif;
  o.reduce = reduce;
  o.type = pixel_type(dtype);
  o.channels_last = channels_last;
  o.max_pixels = max_pixels;
  o.cache_bytes = cache_bytes;
  o.isa = isa_of(isa);
  return std::make_shared<Reader>(std::move(o), store.value_or(nullptr));
}

/// Memory of a contiguous array of count records of that size, which is kept.
void* records(const py::array& array, size_t size, int64_t count, const char* name, Held& held) {
  if (array.itemsize() != static_cast<py::ssize_t>(size) || array.size() != count ||
      !(array.flags() & py::array::c_style))
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(count) + " contiguous records of " +
                                std::to_string(size) + " bytes");
  held.keep(array);
  return const_cast<py::array&>(array).mutable_data();
}

/// The paths of all items, one after the other, each followed by a null character.
void split_paths(const py::bytes& text, std::vector<ReadItem>& items) {
  const char* at = PyBytes_AS_STRING(text.ptr());
  const char* const end = at + PyBytes_GET_SIZE(text.ptr());
  for (ReadItem& item : items) {
    const void* const stop = std::memchr(at, 0, static_cast<size_t>(end - at));
    item.path = at;
    at = stop == nullptr ? end + 1 : static_cast<const char*>(stop) + 1;
    if (at > end) break;
  }
  if (at != end)
    throw std::invalid_argument("expected " + std::to_string(items.size()) + " paths, each followed by a null byte");
}

/// (address, bytes, records [views, count] of PlanarImage, offsets [count], wanted bytes [count])
using ArenaTuple = std::tuple<uintptr_t, int64_t, py::array, py::array, py::array>;

ReadArena read_arena(const ArenaTuple& given, const ReaderOptions& options, int64_t count, Held& held) {
  const auto& [address, bytes, images, offset, wanted] = given;
  if (options.channels != 3) throw std::invalid_argument("arena: expected a reader of 3 channels, found 1");
  ReadArena arena;
  arena.memory = reinterpret_cast<uint8_t*>(address);
  arena.bytes = bytes;
  const auto views = static_cast<int64_t>(options.views.size());
  arena.images = static_cast<PlanarImage*>(records(images, sizeof(PlanarImage), views * count, "images", held));
  arena.offset = static_cast<int64_t*>(records(offset, sizeof(int64_t), count, "offset", held));
  arena.wanted = static_cast<int64_t*>(records(wanted, sizeof(int64_t), count, "wanted", held));
  return arena;
}

std::unique_ptr<ReadTicket> submit(const std::shared_ptr<Reader>& reader,
                                   const std::variant<py::list, py::bytes>& items,
                                   const std::optional<py::list>& indexes, const Longs& index,
                                   const std::optional<Longs>& keys, const std::vector<uintptr_t>& outs, uint64_t seed,
                                   uint32_t epoch, const std::vector<uint32_t>& views, const py::array& status,
                                   const py::array& error, const py::array& height, const py::array& width,
                                   const std::vector<py::array>& params,
                                   const std::vector<std::optional<py::array>>& effects,
                                   const std::optional<ArenaTuple>& arena) {
  if (reader->elsewhere()) throw std::runtime_error(kElsewhere);
  const py::list* const listed = std::get_if<py::list>(&items);
  const size_t count = listed != nullptr ? listed->size() : static_cast<size_t>(index.size());
  const size_t views_made = reader->options().views.size();
  const auto records_wanted = static_cast<int64_t>(count);
  if (outs.size() != views_made || views.size() != views_made || params.size() != views_made ||
      effects.size() != views_made)
    throw std::invalid_argument("submit: expected outs, views, params and effects of " + std::to_string(views_made) +
                                " views");
  if (indexes && indexes->size() != count) throw std::invalid_argument("submit: items and indexes differ in length");
  if (index.size() != records_wanted) throw std::invalid_argument("submit: items and index differ in length");
  if (keys && keys->size() != records_wanted) throw std::invalid_argument("submit: items and keys differ in length");
  auto held = std::make_unique<Held>();
  held->reserve(count);
  held->keep(index);
  if (keys) held->keep(*keys);
  ReadRequest request;
  request.items.resize(count);
  if (const py::bytes* const paths = std::get_if<py::bytes>(&items)) {
    split_paths(*paths, request.items);
    held->keep(*paths);
  }
  for (size_t i = 0; i < count; ++i) {
    ReadItem& item = request.items[i];
    if (listed != nullptr) {
      const py::handle given = PyList_GET_ITEM(listed->ptr(), static_cast<py::ssize_t>(i));
      if (PyUnicode_Check(given.ptr()) != 0)
        item.path = held->path(given);
      else
        std::tie(item.data, item.size) = held->bytes(given);
    }
    if (!indexes) continue;
    const py::handle known = PyList_GET_ITEM(indexes->ptr(), static_cast<py::ssize_t>(i));
    if (!known.is_none()) std::tie(item.index, item.index_size) = held->bytes(known);
  }
  request.index = index.data();
  request.keys = keys ? keys->data() : nullptr;
  request.seed = seed;
  request.epoch = epoch;
  request.status = static_cast<uint8_t*>(records(status, 1, records_wanted, "status", *held));
  request.error = static_cast<int32_t*>(records(error, 4, records_wanted, "error", *held));
  request.height = static_cast<int32_t*>(records(height, 4, records_wanted, "height", *held));
  request.width = static_cast<int32_t*>(records(width, 4, records_wanted, "width", *held));
  for (size_t v = 0; v < views_made; ++v) {
    ReadTarget target;
    target.out = reinterpret_cast<void*>(outs[v]);
    target.view = views[v];
    target.parameters =
        static_cast<AugmentParameters*>(records(params[v], sizeof(AugmentParameters), records_wanted, "params", *held));
    if (effects[v])
      target.effects =
          static_cast<AugmentEffects*>(records(*effects[v], sizeof(AugmentEffects), records_wanted, "effects", *held));
    request.targets.push_back(target);
  }
  if (arena) request.arena = read_arena(*arena, reader->options(), records_wanted, *held);
  std::shared_ptr<ReadBatch> batch = reader->submit(std::move(request));
  if (batch == nullptr) throw std::runtime_error("the reader is closed; make another one");
  return std::make_unique<ReadTicket>(reader, std::move(batch), std::move(held));
}

py::tuple store_find(IndexStore& store, int64_t image, uint64_t size, int64_t modified) {
  std::vector<uint8_t> payload;
  bool known = false;
  const StoredKind kind = store.find({image, size, modified}, payload, &known);
  if (kind == StoredKind::nothing) payload.clear();
  const char* word = kind == StoredKind::index ? "index" : kind == StoredKind::other ? "other" : "nothing";
  return py::make_tuple(word, py::bytes(reinterpret_cast<const char*>(payload.data()), payload.size()));
}

/// Text that may hold a path.
py::str text_of(const std::string& text) {
  PyObject* const made = PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<py::ssize_t>(text.size()));
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(made);
}

int orientation(const py::buffer& data) {
  const py::buffer_info info = data.request();
  if (info.itemsize != 1 || info.ndim != 1 || (info.shape[0] > 1 && info.strides[0] != 1))
    throw std::invalid_argument("jpeg: expected contiguous bytes");
  const auto* bytes = static_cast<const uint8_t*>(info.ptr);
  const auto size = static_cast<size_t>(info.size);
  JpegFile file;
  return read_jpeg_header(bytes, size, file) == JpegStatus::ok ? jpeg_orientation(bytes, size, file) : 0;
}

}  // namespace

void bind_reader(py::module_& m) {
  py::class_<IndexStore, std::shared_ptr<IndexStore>>(m, "IndexStore", py::module_local(),
                                                      "Checkpoint indexes by image number, in append-only files.")
      .def(py::init([](const py::bytes& folder, int rank) {
             return std::make_shared<IndexStore>(std::string(folder), rank);
           }),
           py::arg("folder"), py::arg("rank"))
      .def("find", &store_find, py::arg("image"), py::arg("size"), py::arg("modified"),
           "(\"index\" | \"other\" | \"nothing\", payload)")
      .def(
          "add",
          [](IndexStore& store, int64_t image, uint64_t size, int64_t modified, const py::bytes& index, bool replace) {
            const std::string bytes = index;
            store.add({image, size, modified}, StoredKind::index, reinterpret_cast<const uint8_t*>(bytes.data()),
                      bytes.size(), replace);
          },
          py::arg("image"), py::arg("size"), py::arg("modified"), py::arg("index"), py::arg("replace"),
          "Appends the index of an image.")
      .def("refresh", &IndexStore::refresh, py::call_guard<py::gil_scoped_release>(),
           "Takes in what other processes have written.")
      .def("close", &IndexStore::close, "Ends reading and writing.")
      .def("__len__", &IndexStore::size)
      .def("bytes", &IndexStore::bytes, "Size of all files.")
      .def(
          "failure", [](const IndexStore& store) { return text_of(store.failure()); },
          "Why records are not kept (in the folder); \"\" = they are.")
      .def("writes", &IndexStore::writes, "Whether records are kept, be it in an unnamed file.")
      .def(
          "path", [](const IndexStore& store) { return text_of(store.path()); },
          "Of the file that is written to; \"\" = an unnamed one.");
  py::class_<ReadTicket>(m, "ReadTicket", py::module_local(), "A batch on its way.")
      .def("wait", &ReadTicket::wait, py::arg("milliseconds"), "Whether the batch is done, within so much time.");
  py::class_<Reader, std::shared_ptr<Reader>>(m, "Reader", py::module_local(),
                                              "Threads that make batches of JPEG files.")
      .def(py::init(&make_reader), py::kw_only(), py::arg("options"), py::arg("effects"), py::arg("threads"),
           py::arg("channels"), py::arg("exact"), py::arg("exif"), py::arg("reduce"), py::arg("dtype"),
           py::arg("channels_last"), py::arg("max_pixels"), py::arg("cache_bytes"), py::arg("store"), py::arg("isa"))
      .def("submit", &submit, py::kw_only(), py::arg("items"), py::arg("indexes"), py::arg("index"), py::arg("keys"),
           py::arg("outs"), py::arg("seed"), py::arg("epoch"), py::arg("views"), py::arg("status"), py::arg("error"),
           py::arg("height"), py::arg("width"), py::arg("params"), py::arg("effects"), py::arg("arena"),
           "Queues a batch, which is written to the arrays given; outs are addresses, not looked at with an arena: "
           "(address, bytes, records [views, count], offsets [count], wanted bytes [count]).")
      .def("close", &Reader::close, py::call_guard<py::gil_scoped_release>(), "Ends the threads.")
      .def("elsewhere", &Reader::elsewhere, "Whether another process made it.")
      .def("threads", &Reader::threads, "Threads that are there.")
      .def("cached_bytes", &Reader::cached_bytes, "Memory of the small images that are kept.");
  m.def("jpeg_orientation", &orientation, py::arg("data"),
        "Orientation in the EXIF data of a JPEG file, 1..8; 0 = ask Pillow.");
}

}  // namespace sela
