// Calls with something wrong in them: each is an error that names it, or does no harm.

#ifndef PALLASITE_TESTS_FAULTS_H_
#define PALLASITE_TESTS_FAULTS_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "host.h"
#include "numbers.h"

namespace check {

class Faults {
 public:
  // `make` makes a call with nothing wrong in it, again and again over the same memory.
  Faults(std::function<Invocation()> make, Random& random, Pool& pool)
      : make_(std::move(make)), random_(random), pool_(pool) {}

  int num_refused() const { return num_refused_; }

  // Calls with this change; raises Wrong where the error does not have this text.
  void refuse(const std::string& message, const std::function<void(Invocation&)>& change);

  // Puts these numbers in an argument's place, from the first on; the rest stays as it is.
  void refuse_numbers(const std::string& message, const std::string& name, size_t first,
                      const std::vector<int32_t>& numbers);

  // Each argument and result at an address that its type's size does not divide, and each of a type
  // that it cannot have; the last argument is missing, and each result.
  void refuse_each();

  // Each argument and result of another shape, which it has the memory for, and integers that may
  // be anything. Some of these calls are in order: nothing is asked but that memory is kept to.
  void survive(int num_calls);

 private:
  std::byte* own(size_t size);
  void replace(Invocation& invocation, const std::string& name, const Buffer& buffer);

  std::function<Invocation()> make_;
  Random& random_;
  Pool& pool_;
  std::vector<std::unique_ptr<std::byte[]>> memory_;
  int num_refused_ = 0;
};

}  // namespace check

#endif  // PALLASITE_TESTS_FAULTS_H_
