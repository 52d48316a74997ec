// Which bodies this processor runs.

#ifndef PALLASITE_CHOOSE_H_
#define PALLASITE_CHOOSE_H_

#include <string_view>

#include "bodies.h"

namespace pallasite {

struct Choice {
  const char* name;      // of the instruction set; empty where no body runs here
  const Bodies* bodies;  // null there
};

// Returns the best bodies of those that run here, or, by their name, these; none where they do not.
Choice choose();
Choice choose(std::string_view name);

}  // namespace pallasite

#endif  // PALLASITE_CHOOSE_H_
