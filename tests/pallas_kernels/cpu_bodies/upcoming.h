// What a team of threads is told that a later operation reads, and what of it is taken.

#ifndef PALLASITE_TESTS_UPCOMING_H_
#define PALLASITE_TESTS_UPCOMING_H_

#include <string>

#include "numbers.h"

namespace check {

// Says what some chunks will read, and takes it in any order; raises Wrong where a byte of it is taken
// twice or never, or another thread's. Returns what it was, in words.
std::string check_upcoming(Random& random);

}  // namespace check

#endif  // PALLASITE_TESTS_UPCOMING_H_
