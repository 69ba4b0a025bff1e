#pragma once

#include <cstdint>
#include <map>
#include <string_view>

namespace lora_serve {

/// What random operations did, so that a generator that went blind is noticed. Names are literals.
class OperationCoverage {
 public:
  void Count(std::string_view what, bool has_happened = true) {
    counts_[what] += has_happened ? 1 : 0;
  }
  [[nodiscard]] std::int64_t CountOf(std::string_view what) const {
    const auto it = counts_.find(what);
    return it == counts_.end() ? 0 : it->second;
  }
  [[nodiscard]] const std::map<std::string_view, std::int64_t>& counts() const { return counts_; }

 private:
  std::map<std::string_view, std::int64_t> counts_;
};

}  // namespace lora_serve
