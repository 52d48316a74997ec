// Memory of any size, which is cleared to its end and no further.

#ifndef PALLASITE_TESTS_CLEAR_H_
#define PALLASITE_TESTS_CLEAR_H_

#include <string>

#include "host.h"
#include "numbers.h"

namespace check {

// Clears some memory and looks at it; raises Wrong. Returns what it was, in words.
std::string check_clear(Random& random, Pool& pool);

}  // namespace check

#endif  // PALLASITE_TESTS_CLEAR_H_
