#include "kv_prefix_cache/pinned_paths.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "cache_scenario.h"
#include "common/errors.h"
#include "kv_prefix_cache/namespace.h"
#include "kv_prefix_cache/page_pool.h"

namespace lora_serve {
namespace {

constexpr std::int32_t kPageSize = 1;

/// A tree whose nodes hold all pages of their edges on the device.
class PinnedPathsTest : public testing::Test {
 protected:
  Node& Add(Node& parent, std::int32_t num_pages) {
    Node& node = tree().AddChild(parent, Sequence(100 * next_token_++, num_pages * kPageSize));
    Held(node).pages = pool_.Allocate(num_pages);
    return node;
  }
  void Grow(Node& leaf, std::int32_t num_pages) {
    tree().ExtendLeaf(leaf, Sequence(100 * next_token_++, num_pages * kPageSize));
    Held(leaf).pages.Append(pool_.Allocate(num_pages));
    paths_.PagesChanged(leaf, num_pages);
  }
  void Remove(Node& leaf) {
    paths_.PagesChanged(leaf, -Held(leaf).pages.size());
    Held(leaf).pages = {};
    paths_.Forget(leaf);
    tree().RemoveLeaf(leaf);
  }
  void Pin(Node& node) {
    if (Held(node).num_pins++ == 0) paths_.Add(node);
  }
  void Unpin(Node& node) {
    if (--Held(node).num_pins == 0) paths_.Remove(node);
  }
  static Residency& Held(Node& node) { return node.On(Tier::kDevice); }
  RadixTree& tree() { return namespace_.tree(); }
  Node& root() { return tree().root(); }
  /// Pages of all nodes with a pin at or below them, counted by looking at every node.
  std::int64_t NaiveCount() {
    std::int64_t num_pages = 0;
    tree().ForEachNode([&](Node& node) {
      if (HasPinBelow(node)) num_pages += Held(node).pages.size();
    });
    return num_pages;
  }
  static bool HasPinBelow(Node& node) {
    bool has_pin = Held(node).num_pins > 0;
    node.children.ForEach([&has_pin](Node& child) { has_pin |= HasPinBelow(child); });
    return has_pin;
  }

  PagePool pool_{10'000};
  NodeSequencer sequencer_;
  PinnedPaths paths_{Component::kFullAttention, Tier::kDevice};
  Namespace namespace_{kBaseNamespace, {}, kPageSize, &sequencer_, nullptr};
  TokenId next_token_ = 1;
};

TEST_F(PinnedPathsTest, PagesOfSharedBeginningsCountOnce) {
  Node& parent = Add(root(), 4);
  Node& left = Add(parent, 2);
  Node& right = Add(parent, 3);
  Pin(left);
  EXPECT_EQ(paths_.CountPages(), 6);
  Pin(right);
  EXPECT_EQ(paths_.CountPages(), 9);
  Unpin(left);
  EXPECT_EQ(paths_.CountPages(), 7);
  Unpin(right);
  EXPECT_EQ(paths_.CountPages(), 0);
}

TEST_F(PinnedPathsTest, APinThatMovesDownBetweenTwoQuestionsKeepsThePath) {
  Node& parent = Add(root(), 4);
  Pin(parent);
  EXPECT_EQ(paths_.CountPages(), 4);
  Node& child = Add(parent, 2);
  Pin(child);
  Unpin(parent);
  EXPECT_EQ(paths_.CountPages(), 6);
  Unpin(child);
  Pin(parent);
  EXPECT_EQ(paths_.CountPages(), 4);
  Unpin(parent);
}

TEST_F(PinnedPathsTest, APinThatIsBackBeforeTheQuestionWasNeverGone) {
  Node& node = Add(root(), 3);
  Pin(node);
  EXPECT_EQ(paths_.CountPages(), 3);
  Unpin(node);
  Pin(node);
  paths_.CheckInvariants();
  EXPECT_EQ(paths_.CountPinnedNodes(), 1);
  EXPECT_EQ(paths_.CountPages(), 3);
  Unpin(node);
  EXPECT_EQ(paths_.CountPinnedNodes(), 0);
  paths_.CheckInvariants();
}

TEST_F(PinnedPathsTest, PagesThatComeToACountedPathAreCounted) {
  Node& leaf = Add(root(), 3);
  Pin(leaf);
  Grow(leaf, 2);
  EXPECT_EQ(paths_.CountPages(), 5);
  Grow(leaf, 4);
  EXPECT_EQ(paths_.CountPages(), 9);
  Unpin(leaf);
  Grow(leaf, 1);
  EXPECT_EQ(paths_.CountPages(), 0);
  Grow(leaf, 1);
  EXPECT_EQ(paths_.CountPages(), 0);
}

TEST_F(PinnedPathsTest, BothHalvesOfACountedEdgeStayCounted) {
  Node& lower = Add(root(), 5);
  Pin(lower);
  EXPECT_EQ(paths_.CountPages(), 5);
  Node& upper = tree().Split(lower, 2);
  EXPECT_EQ(paths_.CountPages(), 5);
  paths_.CheckInvariants();
  Pin(upper);
  Unpin(lower);
  EXPECT_EQ(paths_.CountPages(), 2);
  Unpin(upper);
  EXPECT_EQ(paths_.CountPages(), 0);
}

TEST_F(PinnedPathsTest, CountsWhatAnotherPinWouldAdd) {
  Node& parent = Add(root(), 4);
  Node& leaf = Add(parent, 3);
  Node& sibling = Add(parent, 8);
  EXPECT_EQ(paths_.CountPages({.node = &leaf, .num_edge_pages = 1}), 5);
  EXPECT_EQ(paths_.CountPages({.node = &root(), .num_edge_pages = 0}), 0);
  Pin(sibling);
  EXPECT_EQ(paths_.CountPages({.node = &leaf, .num_edge_pages = 1}), 13);
  EXPECT_EQ(paths_.CountPages({.node = &sibling, .num_edge_pages = 2}), 12);
  EXPECT_EQ(paths_.CountPages(), 12) << "the question alone pins nothing";
  Unpin(sibling);
}

TEST_F(PinnedPathsTest, ANodeThatGoesBeforeTheQuestionIsForgotten) {
  Node& parent = Add(root(), 4);
  Node& leaf = Add(parent, 3);
  Pin(leaf);
  EXPECT_EQ(paths_.CountPages(), 7);
  Unpin(leaf);
  Remove(leaf);
  paths_.CheckInvariants();
  EXPECT_EQ(paths_.CountPages(), 0);
}

TEST_F(PinnedPathsTest, CheckInvariantsNoticesPagesThatWentAround) {
  Node& leaf = Add(root(), 3);
  Pin(leaf);
  EXPECT_EQ(paths_.CountPages(), 3);
  Held(leaf).num_counted_children = 1;
  EXPECT_THROW(paths_.CheckInvariants(), InternalError);  // E6
  Held(leaf).num_counted_children = 0;
  Held(leaf).pages.Append(pool_.Allocate(1));
  EXPECT_THROW(paths_.CheckInvariants(), InternalError);  // E6
  paths_.PagesChanged(leaf, 1);
  paths_.CheckInvariants();
  Unpin(leaf);
}

TEST_F(PinnedPathsTest, EqualsANaiveCountInRandomTrees) {
  std::mt19937 random(11);
  const auto draw = [&random](std::size_t end) {
    return std::uniform_int_distribution<std::size_t>(0, end - 1)(random);
  };
  std::vector<Node*> nodes{&root()};
  std::vector<Node*> pins;
  for (int step = 0; step < 20'000; ++step) {
    SCOPED_TRACE(::testing::Message() << "step " << step);
    Node& node = *nodes[draw(nodes.size())];
    switch (draw(8)) {
      case 0:
        if (nodes.size() < 60) nodes.push_back(&Add(node, 1 + static_cast<int>(draw(4))));
        break;
      case 1:
        if (!node.IsRoot() && node.num_pages > 1) {
          nodes.push_back(&tree().Split(
              node, 1 + static_cast<int>(draw(static_cast<std::size_t>(node.num_pages) - 1))));
        }
        break;
      case 2:
        if (!node.IsRoot() && node.children.IsEmpty() && node.num_pages < 20) Grow(node, 2);
        break;
      case 3:
        if (!node.IsRoot() && node.children.IsEmpty() && Held(node).num_pins == 0) {
          std::erase(nodes, &node);
          Remove(node);
        }
        break;
      case 4:
      case 5:
        Pin(node);
        pins.push_back(&node);
        break;
      default:
        if (pins.empty()) break;
        std::swap(pins[draw(pins.size())], pins.back());
        Unpin(*pins.back());
        pins.pop_back();
        break;
    }
    if (step % 16 == 0) paths_.CheckInvariants();
    if (draw(6) != 0) continue;
    const std::int64_t expected = NaiveCount();
    ASSERT_EQ(paths_.CountPagesAfresh(), expected);
    ASSERT_EQ(paths_.CountPages(), expected);
    const std::set<Node*> pinned(pins.begin(), pins.end());
    ASSERT_EQ(paths_.CountPinnedNodes(), std::ssize(pinned));
  }
  for (Node* const node : pins) Unpin(*node);
  EXPECT_EQ(paths_.CountPages(), 0);
}

}  // namespace
}  // namespace lora_serve
