#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <string>

// Two processes whose objects lie at other addresses (other allocations, address space layout
// randomisation) and whose pages hash to other values hold byte-identical caches, and make
// byte-identical plans, after the same calls: what tensor-parallel ranks rely on (PITFALLS 12, 24).
// The paths are set by CMake.

namespace lora_serve {
namespace {

/// What the program prints.
std::string Run(const std::string& program, const std::string& arguments) {
  const std::string command = program + " " + arguments + " 2>&1";
  FILE* const pipe = popen(command.c_str(), "r");
  EXPECT_NE(pipe, nullptr) << command;
  if (pipe == nullptr) return {};
  std::string output;
  std::array<char, 65536> buffer;
  while (const std::size_t num_read = std::fread(buffer.data(), 1, buffer.size(), pipe)) {
    output.append(buffer.data(), num_read);
  }
  EXPECT_EQ(pclose(pipe), 0) << command << '\n' << output.substr(0, 2000);
  return output;
}

/// Equality of texts of megabytes, which gtest would print.
void ExpectEqual(const std::string& one, const std::string& other, const std::string& what) {
  if (one == other) return;
  const auto differs = std::mismatch(one.begin(), one.end(), other.begin(), other.end());
  const auto at = static_cast<std::size_t>(differs.first - one.begin());
  const std::size_t line = one.rfind('\n', at) + 1;
  ADD_FAILURE() << what << ": the outputs differ at byte " << at << '\n'
                << one.substr(line, 500) << '\n'
                << other.substr(line, 500);
}

std::string Replay(const std::string& program, std::uint64_t seed, int num_padding_bytes) {
  return Run(program, std::to_string(seed) + " 3000 " + std::to_string(num_padding_bytes));
}

std::string ReplayPlans(const std::string& program, std::uint64_t seed, int num_padding_bytes,
                        std::int64_t request_id_factor) {
  return Run(program, std::to_string(seed) + " 10000 " + std::to_string(num_padding_bytes) + " " +
                          std::to_string(request_id_factor));
}

TEST(ProcessDeterminismTest, OtherAddressesAndOtherHashesGiveTheSameDumps) {
  std::size_t num_bytes = 0;
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    const std::string dumps = Replay(CACHE_REPLAY, seed, 0);
    EXPECT_EQ(dumps, Replay(CACHE_REPLAY, seed, 4000)) << "other addresses, seed " << seed;
    EXPECT_EQ(dumps, Replay(CACHE_REPLAY_OTHER_HASH, seed, 48)) << "other hashes, seed " << seed;
    num_bytes += dumps.size();
  }
  EXPECT_GT(num_bytes, 100'000u);  // the caches were not empty
}

// An even seed replays without overlap, an odd one with it.
TEST(ProcessDeterminismTest, OtherAddressesHashesAndRequestIdsGiveTheSame10000Plans) {
  for (std::uint64_t seed = 4; seed <= 5; ++seed) {
    const std::string name = "seed " + std::to_string(seed);
    const std::string plans = ReplayPlans(SCHEDULER_REPLAY, seed, 0, 1);
    EXPECT_GE(std::count(plans.begin(), plans.end(), '\n'), 10'000) << name;
    ExpectEqual(plans, ReplayPlans(SCHEDULER_REPLAY_OTHER_HASH, seed, 700, 1),
                "other addresses and hashes of pages, " + name);
    ExpectEqual(plans, ReplayPlans(SCHEDULER_REPLAY, seed, 48, 1'000'003),
                "other ids of requests, " + name);
  }
}

}  // namespace
}  // namespace lora_serve
