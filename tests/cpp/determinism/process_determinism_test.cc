#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <string>

// Two processes whose nodes lie at other addresses (other allocations, address space layout
// randomisation) and whose pages hash to other values hold byte-identical caches after the same
// calls: what tensor-parallel ranks rely on (PITFALLS 12). The paths are set by CMake.

namespace lora_serve {
namespace {

std::string Replay(const std::string& program, std::uint64_t seed, int num_padding_bytes) {
  const std::string command =
      program + " " + std::to_string(seed) + " 3000 " + std::to_string(num_padding_bytes) + " 2>&1";
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

}  // namespace
}  // namespace lora_serve
