#include "kv_prefix_cache/matcher.h"

#include <gtest/gtest.h>

#include "common/errors.h"
#include "kv_prefix_cache/page_pool.h"

namespace lora_serve {
namespace {

/// A path of two edges, pages [0, 3) and [3, 5), one token a page.
class MatcherTest : public testing::Test {
 protected:
  void Hold(Node& node, Tier tier, std::int32_t num_pages, std::int32_t num_in_flight = 0) {
    node.On(tier).pages = pool_.Allocate(num_pages);
    node.On(tier).num_in_flight = num_in_flight;
  }
  void Snapshot(Node& node, Tier tier) { node.Snapshot(tier).pages = pool_.Allocate(1); }
  MatchedPath Path(std::int32_t num_edge_pages = 2) {
    return Cover(
        {.node = &lower_, .num_pages = 3 + num_edge_pages, .num_edge_pages = num_edge_pages},
        /*has_host_tier=*/true);
  }

  PagePool pool_{64};
  NodeSequencer sequencer_;
  RadixTree tree_{1, &sequencer_, nullptr};
  Node& upper_ = tree_.AddChild(tree_.root(), std::vector<TokenId>{1, 2, 3});
  Node& lower_ = tree_.AddChild(upper_, std::vector<TokenId>{4, 5});
};

TEST_F(MatcherTest, CoverReadsTheDeepestPageOfEachTier) {
  Hold(upper_, Tier::kDevice, 2);
  Hold(upper_, Tier::kHost, 3);
  Hold(lower_, Tier::kHost, 2, /*num_in_flight=*/1);
  const MatchedPath path = Path();
  EXPECT_EQ(path.On(Tier::kDevice).num_present, 2);
  EXPECT_EQ(path.On(Tier::kDevice).num_covered, 2);
  EXPECT_EQ(path.On(Tier::kHost).num_present, 4);
  EXPECT_EQ(path.On(Tier::kHost).num_covered, 5);
}

TEST_F(MatcherTest, CoverStopsWhereTheMatchStopped) {
  Hold(upper_, Tier::kDevice, 3);
  Hold(lower_, Tier::kDevice, 2, /*num_in_flight=*/1);
  EXPECT_EQ(Path(1).On(Tier::kDevice).num_present, 4);
  EXPECT_EQ(Path(1).On(Tier::kDevice).num_covered, 4);
  EXPECT_EQ(Path(1).On(Tier::kHost).num_covered, 0);
}

TEST_F(MatcherTest, AttentionResumesBehindTheDeepestPresentPageOfEitherTier) {
  Hold(upper_, Tier::kDevice, 3);
  Hold(upper_, Tier::kHost, 3);
  Hold(lower_, Tier::kHost, 1);
  EXPECT_EQ(AttentionMatcher().DeepestBoundary(Path(), 5), 4);
  EXPECT_EQ(AttentionMatcher().DeepestBoundary(Path(), 2), 2);
}

TEST_F(MatcherTest, StateResumesAtASnapshotOnly) {
  EXPECT_EQ(StateMatcher().DeepestBoundary(Path(), 5), 0);
  Snapshot(upper_, Tier::kHost);
  EXPECT_EQ(StateMatcher().DeepestBoundary(Path(), 5), 3);
  Snapshot(lower_, Tier::kDevice);
  EXPECT_EQ(StateMatcher().DeepestBoundary(Path(), 5), 5);
  EXPECT_EQ(StateMatcher().DeepestBoundary(Path(), 4), 3);
  EXPECT_EQ(StateMatcher().DeepestBoundary(Path(1), 4), 3);  // the match ends inside the edge
  EXPECT_EQ(StateMatcher().DeepestBoundary(Path(), 2), 0);
}

TEST_F(MatcherTest, ASnapshotInFlightCannotBeResumedFrom) {
  Snapshot(upper_, Tier::kDevice);
  upper_.Snapshot(Tier::kDevice).num_in_flight = 1;
  EXPECT_EQ(StateMatcher().DeepestBoundary(Path(), 5), 0);
}

TEST_F(MatcherTest, ARingBufferWindowResumesNowhere) {
  Hold(upper_, Tier::kDevice, 3);
  EXPECT_EQ(RingBufferMatcher().DeepestBoundary(Path(), 3), 0);
  const KVPrefixCacheOptions ring{.window_layers = WindowLayers::kRingBuffer};
  EXPECT_EQ(Matchers(ring).DeepestBoundary(Path(), 5), 0);
  const KVPrefixCacheOptions paged{.window_layers = WindowLayers::kPaged};
  EXPECT_EQ(Matchers(paged).DeepestBoundary(Path(), 5), 3);
}

TEST_F(MatcherTest, ABoundaryCountsWhenAllMatchersAgree) {
  Hold(upper_, Tier::kDevice, 3);
  Hold(lower_, Tier::kDevice, 1);
  Snapshot(upper_, Tier::kDevice);
  Snapshot(lower_, Tier::kDevice);  // behind a page that is gone
  const KVPrefixCacheOptions hybrid{.num_device_state_slots = 8};
  EXPECT_EQ(Matchers(hybrid).DeepestBoundary(Path(), 5), 3);
  EXPECT_EQ(Matchers({}).DeepestBoundary(Path(), 5), 4);
}

TEST_F(MatcherTest, FindNodeEndingAtKnowsOnlyBoundariesBetweenEdges) {
  EXPECT_EQ(FindNodeEndingAt(lower_, 5), &lower_);
  EXPECT_EQ(FindNodeEndingAt(lower_, 4), nullptr);
  EXPECT_EQ(FindNodeEndingAt(lower_, 3), &upper_);
  EXPECT_EQ(FindNodeEndingAt(lower_, 1), nullptr);
  EXPECT_EQ(FindNodeEndingAt(lower_, 0), &tree_.root());
  EXPECT_THROW((void)FindNodeEndingAt(upper_, 4), InternalError);
}

}  // namespace
}  // namespace lora_serve
