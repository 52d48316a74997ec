// Random batches of paged attention, what they must be, and those that contradict themselves.

#ifndef PALLASITE_TESTS_ATTENTION_H_
#define PALLASITE_TESTS_ATTENTION_H_

#include <string>

#include "host.h"
#include "numbers.h"

namespace check {

// Makes a batch over a cache of random pages, attends with these instructions, and compares all
// outputs with sums in f64, and the cache bit by bit where nothing was to be written; raises Wrong.
// Returns what it was, in words.
std::string check_attention(const std::string& instructions, Random& random, Pool& pool);

// The same batch is called with one thing wrong at a time; raises Wrong where that is no error that
// names it. Returns how many were refused.
int refuse_attention(const std::string& instructions, Random& random, Pool& pool);

}  // namespace check

#endif  // PALLASITE_TESTS_ATTENTION_H_
