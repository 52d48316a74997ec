#include "clear.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace check {

std::string check_clear(Random& random, Pool& pool) {
  // Some reach over pages of two megabytes.
  const int64_t size = random.whole(0, random.any_size(1, 6 << 20));
  const std::string shown = text("clearing ", size, " bytes");
  std::vector<uint8_t> bytes(static_cast<size_t>(size), 7);
  const std::string error = call({PallasiteClear, {}, {view("the zeros", bytes, {size})}, {}}, pool);
  if (!error.empty()) throw Wrong(shown + ": " + error);
  const auto found = std::find_if(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte != 0; });
  if (found != bytes.end()) {
    throw Wrong(text(shown, ": byte ", found - bytes.begin(), " is ", int{*found}));
  }
  return shown;
}

}  // namespace check
