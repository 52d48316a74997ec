// Random products, what they must be, and those that contradict themselves.

#ifndef PALLASITE_TESTS_PRODUCTS_H_
#define PALLASITE_TESTS_PRODUCTS_H_

#include <string>

#include "host.h"
#include "numbers.h"

namespace check {

// Makes a product of these instructions, calls it, and compares all outputs with sums in f64; raises
// Wrong. Returns what it was, in words.
std::string check_product(const std::string& instructions, Random& random, Pool& pool);

// The same product is called with one thing wrong at a time; raises Wrong where that is no error
// that names it. Returns how many were refused.
int refuse_products(const std::string& instructions, Random& random, Pool& pool);

}  // namespace check

#endif  // PALLASITE_TESTS_PRODUCTS_H_
