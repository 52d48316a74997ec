#include "upcoming.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <set>
#include <vector>

#include "../../../pallas_kernels/cpu/team.h"
#include "host.h"

namespace check {

std::string check_upcoming(Random& random) {
  using pallasite::kFetched;
  constexpr int64_t kMost = 4 << 20;
  const int64_t num_threads = random.whole(1, 9), num_chunks = random.whole(0, 40);
  const int64_t page_size = random.any_size(1, 300) * kFetched;
  const int64_t num_pages = num_chunks * random.whole(0, 60);
  const int64_t num_runs = std::min(num_threads, num_chunks);
  const std::string shown = text("reads of ", num_chunks, " chunks by ", num_threads, " threads, of ",
                                 num_pages, " pages of ", page_size);
  // Never read, and so never made.
  const std::byte* const memory = reinterpret_cast<const std::byte*>(uintptr_t{1} << 32);
  pallasite::Team* const team = pallasite::Team::take();
  team->expect(num_chunks, num_threads, page_size, [&](int64_t chunk, const auto& add) {
    for (int64_t page = num_pages * chunk / std::max<int64_t>(num_chunks, 1);
         page < num_pages * (chunk + 1) / num_chunks; ++page) {
      add(memory + page * page_size);
    }
  });
  std::vector<std::set<int64_t>> taken(static_cast<size_t>(num_runs));
  std::vector<bool> is_empty(static_cast<size_t>(num_runs));
  const int64_t later_chunks = num_runs == 0 ? 0 : random.whole(1, 60);
  for (int64_t chunk = 0; chunk < later_chunks; ++chunk) {
    // As the team cuts chunks into runs.
    size_t run = 0;
    while (later_chunks * (static_cast<int64_t>(run) + 1) / num_runs <= chunk) ++run;
    const int64_t count = random.whole(0, 200);
    const bool takes_all = count > 0 && random.chance(0.5);
    do {
      pallasite::Upcoming upcoming = team->take_expected(chunk, later_chunks, count);
      int64_t size = 0;
      while (const std::byte* unit = upcoming.take()) {
        ++size;
        if (!taken[run].insert((unit - memory) / kFetched).second) {
          throw Wrong(shown + ": some is taken twice");
        }
      }
      if (size > count) throw Wrong(text(shown, ": ", size, " units are taken, not ", count));
      is_empty[run] = count > 0 && size == 0;
    } while (takes_all && !is_empty[run]);
  }
  team->give_back();
  for (int64_t run = 0; run < num_runs; ++run) {
    const std::set<int64_t>& own = taken[static_cast<size_t>(run)];
    const int64_t units = page_size / kFetched;
    const int64_t first = num_pages * (num_chunks * run / num_runs) / num_chunks * units;
    const int64_t end = num_pages * (num_chunks * (run + 1) / num_runs) / num_chunks * units;
    const int64_t all = std::min(end - first, kMost / page_size * units);
    const auto count = static_cast<int64_t>(own.size());
    // What is taken is taken in order, so that there are no gaps.
    const bool is_in_order = count == 0 || (*own.begin() == first && *own.rbegin() == first + count - 1);
    if (!is_in_order || count > all || (is_empty[static_cast<size_t>(run)] && count < all)) {
      throw Wrong(text(shown, ": thread ", run, " has ", count, " units of ", all, " from ", first));
    }
  }
  return shown;
}

}  // namespace check
