#include "scheduler_sim/trace_reader.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "common/errors.h"
#include "scheduler_sim/request_source.h"

namespace lora_serve::sim {
namespace {

const std::string kTrace =
    R"({"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 7, 8]})"
    "\n\n"
    R"({"timestamp": 27.5, "input_length": 1300, "output_length": 20, "hash_ids": [0, 7, 9]})"
    "\n"
    R"({"hash_ids":[0],"output_length":1,"input_length":512,"timestamp":30})"
    "\n";

std::string ErrorOf(const std::string& text) {
  std::istringstream input(text);
  TraceReader reader(input);
  try {
    while (reader.Next()) {
    }
  } catch (const InvalidArgumentError& error) {
    return error.what();
  }
  return "none";
}

TEST(TraceReaderTest, ReadsTheFieldsInAnyOrder) {
  std::istringstream input(kTrace);
  TraceReader reader(input);
  const auto first = reader.Next();
  const auto second = reader.Next();
  const auto third = reader.Next();
  ASSERT_TRUE(first && second && third);
  EXPECT_FALSE(reader.Next());
  EXPECT_EQ(first->num_prompt_tokens, 1100);
  EXPECT_EQ(first->num_output_tokens, 5);
  EXPECT_EQ(second->arrival_us, 27'500);
  EXPECT_EQ(second->hash_ids, (std::vector<std::int64_t>{0, 7, 9}));
  EXPECT_EQ(third->arrival_us, 30'000);
  EXPECT_EQ(third->hash_ids, std::vector<std::int64_t>{0});
}

TEST(TraceReaderTest, EqualHashIdsGiveEqualTokens) {
  std::istringstream input(kTrace);
  TraceReader reader(input);
  const auto first = TracePromptTokens(*reader.Next());
  const auto second = TracePromptTokens(*reader.Next());
  ASSERT_EQ(first.size(), 1100U);
  ASSERT_EQ(second.size(), 1300U);
  EXPECT_TRUE(std::equal(first.begin(), first.begin() + 1024, second.begin()));
  EXPECT_NE(first[1024], second[1024]);
}

TEST(TraceReaderTest, ErrorsNameTheLine) {
  EXPECT_NE(ErrorOf("{\"timestamp\": 0}\n").find("line 1"), std::string::npos);
  EXPECT_NE(ErrorOf(kTrace + "what\n").find("line 5"), std::string::npos);
  const std::string late =
      R"({"timestamp": 3, "input_length": 1, "output_length": 1, "hash_ids": [1]})";
  EXPECT_NE(ErrorOf(kTrace + late).find("before"), std::string::npos);
  const std::string short_list =
      R"({"timestamp": 99, "input_length": 513, "output_length": 1, "hash_ids": [1]})";
  EXPECT_NE(ErrorOf(kTrace + short_list).find("2 blocks"), std::string::npos);
  EXPECT_EQ(ErrorOf(kTrace), "none");
}

TEST(TraceSourceTest, AConversationKeepsItsAdapterAndLongRequestsAreLeftOut) {
  const std::string path = ::testing::TempDir() + "scheduler_sim_trace.jsonl";
  {
    std::ofstream file(path);
    for (int turn = 0; turn < 30; ++turn) {
      // Three conversations in turns that share a first block; one request is too long.
      const int id = 100 + turn % 3;
      file << R"({"timestamp": )" << turn << R"(, "input_length": )" << (turn == 5 ? 9000 : 600)
           << R"(, "output_length": 4, "hash_ids": [0, )" << id;
      for (int block = 2; turn == 5 && block < 18; ++block) file << ", " << 1000 + block;
      file << "]}\n";
    }
  }
  WorkloadOptions options;
  options.trace_path = path;
  options.trace_speed = 2.0;
  options.popularity.num_adapters = 1000;
  const auto source = MakeRequestSource(options);
  std::map<TokenId, std::int64_t> adapter_of_conversation;
  std::int64_t num_requests = 0;
  while (source->NextArrivalUs() != kNever) {
    const SimRequest request = source->Take();
    EXPECT_EQ(request.id, num_requests++);
    const TokenId own_token = request.prompt_token_ids[512];
    const auto [known, is_new] = adapter_of_conversation.try_emplace(own_token, request.adapter_id);
    EXPECT_EQ(known->second, request.adapter_id);
    if (request.id == 28) {
      EXPECT_EQ(request.arrival_us, 14'500);
    }
  }
  std::remove(path.c_str());
  EXPECT_EQ(num_requests, 29);
  EXPECT_EQ(adapter_of_conversation.size(), 3U);
}

}  // namespace
}  // namespace lora_serve::sim
