// Calls the CPU's bodies, of every instruction set that runs here, with random arguments.
//
//   check CASES SEED
//
// Each case is a product and an attention, compared with sums in f64, and rows' largest values;
// every tenth is also called with things that are wrong in it. A seed gives the same cases again. Ends with 1 at the first wrong
// answer, and says which case it was; a sanitizer ends it at the first fault.

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "attention.h"
#include "clear.h"
#include "host.h"
#include "numbers.h"
#include "peaks.h"
#include "products.h"
#include "upcoming.h"

namespace {

void run(const std::string& instructions, int64_t num_cases, uint64_t seed) {
  // Alone, with helpers, and with more than there are cores.
  check::Pool pools[] = {check::Pool(1), check::Pool(3), check::Pool(8)};
  int64_t num_refused = 0;
  for (int64_t index = 0; index < num_cases; ++index) {
    check::Random random(seed + static_cast<uint64_t>(index));
    check::Pool& pool = pools[random.whole(0, 2)];
    std::string last = "nothing yet";
    try {
      last = check::check_product(instructions, random, pool);
      last = check::check_attention(instructions, random, pool);
      last = check::check_peaks(instructions, random, pool);
      last = check::check_clear(random, pool);
      last = check::check_upcoming(random);
      if (index % 10 == 0) {
        last = "products with something wrong";
        num_refused += check::refuse_products(instructions, random, pool);
        last = "attention with something wrong";
        num_refused += check::refuse_attention(instructions, random, pool);
        last = "peaks with something wrong";
        num_refused += check::refuse_peaks(instructions, random, pool);
      }
    } catch (const std::exception& error) {
      throw check::Wrong(check::text("case ", index, " with ", instructions, ", seed ",
                                     seed + static_cast<uint64_t>(index), ", after ", last, ": ",
                                     error.what()));
    }
  }
  std::cout << instructions << ": " << num_cases << " products, attentions and peaks are right, "
            << num_refused << " wrong calls were refused" << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: check CASES SEED" << std::endl;
    return 2;
  }
  try {
    const int64_t num_cases = std::stoll(argv[1]);
    const uint64_t seed = std::stoull(argv[2]);
    int num_sets = 0;
    for (const char* instructions : {"avx512-vnni", "avx512", "avx2", "neon"}) {
      if (!pallasite_runs(instructions)) continue;
      run(instructions, num_cases, seed);
      ++num_sets;
    }
    if (num_sets == 0) throw check::Wrong("got a processor that no body runs on");
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
