// Random rows, their largest values, and calls that contradict themselves.

#ifndef PALLASITE_TESTS_PEAKS_H_
#define PALLASITE_TESTS_PEAKS_H_

#include <string>

#include "host.h"
#include "numbers.h"

namespace check {

// Makes rows, calls the body of these instructions, and compares with a plain loop; raises Wrong.
// Returns what they were, in words.
std::string check_peaks(const std::string& instructions, Random& random, Pool& pool);

// The same is called with one thing wrong at a time; raises Wrong where that is no error that names
// it. Returns how many were refused.
int refuse_peaks(const std::string& instructions, Random& random, Pool& pool);

}  // namespace check

#endif  // PALLASITE_TESTS_PEAKS_H_
