#include "kv_prefix_cache/radix_tree.h"

#include <gtest/gtest.h>

#include <vector>

#include "cache_scenario.h"
#include "common/errors.h"
#include "kv_prefix_cache/page_pool.h"

namespace lora_serve {
namespace {

constexpr std::int32_t kPageSize = 2;

class RadixTreeTest : public testing::Test {
 protected:
  Node& Add(Node& parent, const Tokens& tokens) {
    Node& node = tree_.AddChild(parent, tokens);
    node.On(Tier::kDevice).pages = pool_.Allocate(node.num_pages);
    return node;
  }
  PrefixMatch Match(const Tokens& tokens) const { return tree_.Match(tree_.root(), tokens); }
  void TearDown() override { tree_.CheckInvariants(); }

  PagePool pool_{128};
  NodeSequencer sequencer_;
  RadixTree tree_{kPageSize, &sequencer_, nullptr};
};

TEST_F(RadixTreeTest, StartsWithAVirtualRootOfDepthZero) {
  EXPECT_TRUE(tree_.root().IsRoot());
  EXPECT_EQ(tree_.root().end_page(), 0);
  EXPECT_EQ(tree_.num_nodes(), 0);
  const PrefixMatch match = Match({1, 2});
  EXPECT_EQ(match.node, &tree_.root());
  EXPECT_EQ(match.num_pages, 0);
  EXPECT_EQ(match.num_edge_pages, 0);
}

TEST_F(RadixTreeTest, MatchesWholePagesOnly) {
  Node& node = Add(tree_.root(), {1, 2, 3, 4});
  EXPECT_EQ(Match({}).num_pages, 0);
  EXPECT_EQ(Match({1}).num_pages, 0);
  EXPECT_EQ(Match({1, 2}).num_pages, 1);
  EXPECT_EQ(Match({1, 2, 3}).num_pages, 1);
  EXPECT_EQ(Match({1, 2, 3, 5}).num_pages, 1);
  EXPECT_EQ(Match({1, 2, 3, 4, 5, 6}).num_pages, 2);
  EXPECT_EQ(Match({1, 2, 3, 4}).node, &node);
}

TEST_F(RadixTreeTest, MatchStopsInsideAnEdge) {
  Node& upper = Add(tree_.root(), {1, 2});
  Node& lower = Add(upper, {3, 4, 5, 6, 7, 8});
  const PrefixMatch match = Match({1, 2, 3, 4, 5, 6, 9, 9});
  EXPECT_EQ(match.node, &lower);
  EXPECT_EQ(match.num_pages, 3);
  EXPECT_EQ(match.num_edge_pages, 2);
}

TEST_F(RadixTreeTest, MatchEndsAtAParentWhoseChildrenDiffer) {
  Node& upper = Add(tree_.root(), {1, 2});
  Add(upper, {3, 4});
  Add(upper, {3, 5});
  const PrefixMatch match = Match({1, 2, 3, 6});
  EXPECT_EQ(match.node, &upper);
  EXPECT_EQ(match.num_edge_pages, 1);
}

TEST_F(RadixTreeTest, MatchFromANodeBeginsAtItsEnd) {
  Node& upper = Add(tree_.root(), {1, 2});
  Node& lower = Add(upper, {3, 4});
  const PrefixMatch match = tree_.Match(upper, Tokens{3, 4});
  EXPECT_EQ(match.node, &lower);
  EXPECT_EQ(match.num_pages, 1);
  const PrefixMatch none = tree_.Match(upper, Tokens{1, 2});
  EXPECT_EQ(none.node, &upper);
  EXPECT_EQ(none.num_pages, 0);
  EXPECT_EQ(none.num_edge_pages, upper.num_pages);
}

TEST_F(RadixTreeTest, MatchFindsEveryLengthOfALongEdge) {
  const Tokens edge = Sequence(0, 2 * 100);
  Add(tree_.root(), edge);
  for (std::int32_t num_pages = 0; num_pages < 100; ++num_pages) {
    Tokens tokens = edge;
    tokens[static_cast<std::size_t>(2 * num_pages + 1)] = -1;
    EXPECT_EQ(Match(tokens).num_pages, num_pages);
    tokens.resize(static_cast<std::size_t>(2 * num_pages + 1));
    EXPECT_EQ(Match(tokens).num_pages, num_pages);
  }
}

TEST_F(RadixTreeTest, SplitDividesTokensPagesAndDepth) {
  Node& node = Add(tree_.root(), {1, 2, 3, 4, 5, 6});
  Node& upper = tree_.Split(node, 2);
  EXPECT_EQ(upper.tokens, (Tokens{1, 2, 3, 4}));
  EXPECT_EQ(node.tokens, (Tokens{5, 6}));
  EXPECT_EQ(upper.start_page, 0);
  EXPECT_EQ(node.start_page, 2);
  EXPECT_EQ(node.end_page(), 3);
  EXPECT_EQ(upper.On(Tier::kDevice).pages.ids()[1], PageId{1});
  EXPECT_EQ(node.On(Tier::kDevice).pages.ids()[0], PageId{2});
  EXPECT_EQ(node.parent_backptr, &upper);
  EXPECT_EQ(upper.parent_backptr, &tree_.root());
  EXPECT_EQ(tree_.num_nodes(), 2);
  EXPECT_EQ(Match({1, 2, 3, 4, 5, 6}).node, &node);
}

TEST_F(RadixTreeTest, SplitKeepsThePinOnTheLowerHalf) {
  Node& node = Add(tree_.root(), {1, 2, 3, 4});
  node.On(Tier::kDevice).num_pins = 3;
  Node& upper = tree_.Split(node, 1);
  EXPECT_EQ(node.On(Tier::kDevice).num_pins, 3);
  EXPECT_EQ(upper.On(Tier::kDevice).num_pins, 0);
}

TEST_F(RadixTreeTest, SplitKeepsChildrenEpochAndNumberOnTheLowerHalf) {
  Node& node = Add(tree_.root(), {1, 2, 3, 4});
  Node& child = Add(node, {5, 6});
  node.On(Tier::kDevice).epoch = 9;
  const std::int64_t sequence = node.sequence;
  Node& upper = tree_.Split(node, 1);
  EXPECT_EQ(child.parent_backptr, &node);
  EXPECT_EQ(node.sequence, sequence);
  EXPECT_GT(upper.sequence, child.sequence);
  EXPECT_EQ(node.On(Tier::kDevice).epoch, 9);
  EXPECT_EQ(upper.On(Tier::kDevice).epoch, 9);
  EXPECT_EQ(Match({1, 2, 3, 4, 5, 6}).node, &child);
}

TEST_F(RadixTreeTest, SplitDividesPagesInFlightAndPagesOfAPartOfTheEdge) {
  Node& node = tree_.AddChild(tree_.root(), Tokens{1, 2, 3, 4, 5, 6, 7, 8});
  node.On(Tier::kHost).pages = pool_.Allocate(3);
  node.On(Tier::kHost).num_in_flight = 2;
  node.On(Tier::kDevice).pages = pool_.Allocate(4);
  node.On(Tier::kDevice).num_in_flight = 1;
  Node& upper = tree_.Split(node, 2);
  EXPECT_EQ(upper.On(Tier::kHost).pages.size(), 2);
  EXPECT_EQ(upper.On(Tier::kHost).num_in_flight, 1);
  EXPECT_EQ(upper.On(Tier::kHost).num_continuations, 1);
  EXPECT_EQ(node.On(Tier::kHost).pages.size(), 1);
  EXPECT_EQ(node.On(Tier::kHost).num_in_flight, 1);
  EXPECT_EQ(upper.On(Tier::kDevice).num_in_flight, 0);
  EXPECT_EQ(node.On(Tier::kDevice).num_in_flight, 1);
  Node& lower_upper = tree_.Split(node, 1);  // the host has nothing behind this cut
  EXPECT_EQ(lower_upper.On(Tier::kHost).pages.size(), 1);
  EXPECT_EQ(lower_upper.On(Tier::kHost).num_continuations, 0);
  EXPECT_EQ(lower_upper.On(Tier::kDevice).num_continuations, 1);
  EXPECT_TRUE(node.On(Tier::kHost).pages.IsEmpty());
}

TEST_F(RadixTreeTest, SplitLeavesTheSnapshotAtTheEndOfTheEdge) {
  Node& node = Add(tree_.root(), {1, 2, 3, 4});
  node.Snapshot(Tier::kDevice).pages = pool_.Allocate(1);
  Node& upper = tree_.Split(node, 1);
  EXPECT_TRUE(upper.Snapshot(Tier::kDevice).pages.IsEmpty());
  EXPECT_EQ(node.Snapshot(Tier::kDevice).pages.size(), 1);
}

TEST_F(RadixTreeTest, SplitRefusesTheEndsOfAnEdge) {
  Node& node = Add(tree_.root(), {1, 2, 3, 4});
  EXPECT_THROW(tree_.Split(node, 0), InternalError);
  EXPECT_THROW(tree_.Split(node, 2), InternalError);
  EXPECT_THROW(tree_.Split(tree_.root(), 1), InternalError);
}

TEST_F(RadixTreeTest, ExtendLeafGrowsTheEdgeInPlace) {
  Node& node = Add(tree_.root(), {1, 2});
  tree_.ExtendLeaf(node, Tokens{3, 4, 5, 6});
  node.On(Tier::kDevice).pages.Append(pool_.Allocate(2));
  EXPECT_EQ(node.end_page(), 3);
  EXPECT_EQ(Match({1, 2, 3, 4, 5, 6}).num_edge_pages, 3);
  EXPECT_EQ(tree_.num_nodes(), 1);
  EXPECT_THROW(tree_.ExtendLeaf(node, Tokens{7}), InternalError);
  EXPECT_THROW(tree_.ExtendLeaf(tree_.root(), Tokens{7, 8}), InternalError);
}

TEST_F(RadixTreeTest, TruncateLeafRefusesWhileATierHoldsMore) {
  Node& node = Add(tree_.root(), {1, 2, 3, 4, 5, 6});
  EXPECT_THROW(tree_.TruncateLeaf(node, 1), InternalError);
  node.On(Tier::kDevice).pages.ReleaseBack(2);
  tree_.TruncateLeaf(node, 1);
  EXPECT_EQ(node.tokens, (Tokens{1, 2}));
  EXPECT_EQ(node.end_page(), 1);
  EXPECT_THROW(tree_.TruncateLeaf(node, 1), InternalError);
  EXPECT_THROW(tree_.TruncateLeaf(node, 0), InternalError);
}

TEST_F(RadixTreeTest, RemoveLeafReturnsItsPagesAndRefusesInnerNodes) {
  Node& upper = Add(tree_.root(), {1, 2});
  Node& lower = Add(upper, {3, 4});
  EXPECT_THROW(tree_.RemoveLeaf(upper), InternalError);
  EXPECT_THROW(tree_.RemoveLeaf(tree_.root()), InternalError);
  tree_.RemoveLeaf(lower);
  EXPECT_EQ(pool_.num_free_pages(), 127);
  EXPECT_TRUE(upper.children.IsEmpty());
  EXPECT_EQ(tree_.num_nodes(), 1);
}

TEST_F(RadixTreeTest, RefusesEdgesThatAreNotWholePages) {
  EXPECT_THROW(tree_.AddChild(tree_.root(), Tokens{1}), InternalError);
  EXPECT_THROW(tree_.AddChild(tree_.root(), Tokens{}), InternalError);
}

TEST_F(RadixTreeTest, NumbersNodesAcrossTreesInOrderOfCreation) {
  RadixTree other_tree(kPageSize, &sequencer_, nullptr);
  EXPECT_LT(tree_.root().sequence, other_tree.root().sequence);
  Node& node = Add(tree_.root(), {1, 2});
  EXPECT_LT(other_tree.root().sequence, node.sequence);
}

TEST_F(RadixTreeTest, ALongChainIsDestroyedWithoutRecursion) {
  NodeSequencer sequencer;
  RadixTree tree(1, &sequencer, nullptr);
  Node* node = &tree.root();
  for (TokenId token = 0; token < 200000; ++token) node = &tree.AddChild(*node, Tokens{token});
  EXPECT_EQ(node->end_page(), 200000);
}

TEST_F(RadixTreeTest, CheckInvariantsNamesABrokenEdge) {
  Node& node = Add(tree_.root(), {1, 2, 3, 4});
  node.start_page = 5;
  EXPECT_THROW(tree_.CheckInvariants(), InternalError);  // S2
  node.start_page = 0;
  node.num_pages = 1;
  EXPECT_THROW(tree_.CheckInvariants(), InternalError);  // S2
  node.num_pages = 2;
  Add(tree_.root(), {8, 8});  // now the first page is looked up by hash
  node.tokens[0] = 7;
  EXPECT_THROW(tree_.CheckInvariants(), InternalError);  // S3
  node.tokens[0] = 1;
}

}  // namespace
}  // namespace lora_serve
