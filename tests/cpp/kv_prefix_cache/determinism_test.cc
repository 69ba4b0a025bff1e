#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cache_operations.h"

// Two tensor-parallel ranks fed the same calls decide the same, whatever their memory looks like
// (PITFALLS 12).

namespace lora_serve {
namespace {

/// One "rank": a cache, and allocations in between that give its nodes other addresses.
class Rank {
 public:
  Rank(std::uint64_t seed, std::size_t num_padding_bytes)
      : num_padding_bytes_(num_padding_bytes),
        chooser_(seed),
        operations_(
            std::make_unique<CacheOperations>(ChooseAnyConfig(chooser_), &chooser_, &coverage_)) {}

  void RunOne() {
    padding_.emplace_back(num_padding_bytes_);
    operations_->Run(1);
  }
  [[nodiscard]] std::string Dump() const { return operations_->cache().Dump(); }
  [[nodiscard]] const OperationCoverage& coverage() const { return coverage_; }

 private:
  std::size_t num_padding_bytes_;
  std::vector<std::vector<char>> padding_;
  SeededChooser chooser_;
  OperationCoverage coverage_;
  std::unique_ptr<CacheOperations> operations_;
};

TEST(DeterminismTest, TwoRanksHoldTheSameAfterEveryCall) {
  std::int64_t num_evicted = 0;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    Rank first(seed, 8);
    Rank second(seed, 1000);
    for (int operation = 0; operation < 400; ++operation) {
      first.RunOne();
      second.RunOne();
      ASSERT_EQ(first.Dump(), second.Dump()) << "seed " << seed << ", operation " << operation;
    }
    num_evicted += first.coverage().CountOf("evict a device page");
  }
  EXPECT_GT(num_evicted, 300);
}

}  // namespace
}  // namespace lora_serve
