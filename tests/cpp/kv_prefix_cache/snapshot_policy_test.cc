#include "kv_prefix_cache/snapshot_policy.h"

#include <gtest/gtest.h>

#include "common/errors.h"

namespace lora_serve {
namespace {

PrefillProgress Progress(std::int32_t num_computed, std::int32_t num_tokens, std::int32_t max_chunk,
                         std::int32_t branching = 0) {
  return {.page_size = 4,
          .num_computed_tokens = num_computed,
          .num_tokens = num_tokens,
          .max_chunk_tokens = max_chunk,
          .branching_tokens = branching};
}

void ExpectChunk(const PrefillProgress& progress, std::int32_t end, bool takes_snapshot) {
  const PrefillChunk chunk = PlanPrefillChunk(progress);
  EXPECT_EQ(chunk.end_token, end);
  EXPECT_EQ(chunk.takes_snapshot, takes_snapshot);
}

TEST(SnapshotPolicyTest, StopsAtTheLastWholePageOfThePromptThenComputesTheRest) {
  ExpectChunk(Progress(0, 11, 100), 8, true);
  ExpectChunk(Progress(8, 11, 100), 11, false);
}

TEST(SnapshotPolicyTest, APromptOfWholePagesKeepsItsLastTokenForAfterTheSnapshot) {
  ExpectChunk(Progress(0, 12, 100), 8, true);
  ExpectChunk(Progress(8, 12, 100), 12, false);
}

TEST(SnapshotPolicyTest, AShortPromptTakesNone) {
  ExpectChunk(Progress(0, 4, 100), 4, false);
  ExpectChunk(Progress(0, 1, 100), 1, false);
}

TEST(SnapshotPolicyTest, ALongChunkEndsWithAWholePageAndASnapshot) {
  ExpectChunk(Progress(0, 100, 10), 8, true);
  ExpectChunk(Progress(8, 100, 16), 24, true);
}

TEST(SnapshotPolicyTest, AChunkInsideOnePageTakesNone) {
  ExpectChunk(Progress(0, 100, 3), 3, false);
  ExpectChunk(Progress(3, 100, 3), 4, true);
}

TEST(SnapshotPolicyTest, StopsWhereOtherSequencesBranchedOff) {
  ExpectChunk(Progress(0, 100, 64, /*branching=*/20), 20, true);
  ExpectChunk(Progress(20, 100, 64, /*branching=*/20), 84, true);
  ExpectChunk(Progress(0, 100, 16, /*branching=*/20), 16, true);
}

TEST(SnapshotPolicyTest, RefusesAPrefillThatIsDone) {
  EXPECT_THROW((void)PlanPrefillChunk(Progress(8, 8, 4)), InternalError);
  EXPECT_THROW((void)PlanPrefillChunk(Progress(0, 8, 0)), InternalError);
}

}  // namespace
}  // namespace lora_serve
