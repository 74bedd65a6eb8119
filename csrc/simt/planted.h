// Bugs planted on purpose, and the same kernels without them: the checker is itself checked (test_planted.py).
#pragma once
#include <string>
#include <vector>

namespace sela::simt {

/// Names of the planted bugs.
std::vector<std::string> planted_names();

/// Runs the kernel of this name, with its bug or without, and returns what it wrote. Right results are whole numbers.
std::vector<float> run_planted(const std::string& name, bool with_bug);

}  // namespace sela::simt
