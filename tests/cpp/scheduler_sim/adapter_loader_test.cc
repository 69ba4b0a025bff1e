#include "scheduler_sim/adapter_loader.h"

#include <gtest/gtest.h>

#include <vector>

#include "scheduler_sim/lru_set.h"
#include "sim_scenario.h"

namespace lora_serve::sim {
namespace {

using testing::MakeDevice;

TEST(LruSetTest, TheOldestIsTheOneNotTouchedForLongest) {
  LruSet set;
  const auto any = [](std::int64_t) { return true; };
  EXPECT_EQ(set.Oldest(any), 0);
  for (const std::int64_t id : {1, 2, 3}) set.Touch(id);
  set.Touch(1);
  EXPECT_EQ(set.Oldest(any), 2);
  EXPECT_EQ(set.Oldest([](std::int64_t id) { return id != 2; }), 3);
  set.Erase(2);
  set.Erase(2);
  EXPECT_EQ(set.Oldest(any), 3);
  EXPECT_EQ(set.size(), 2U);
}

/// Ten adapters of 16 MB on the simple device: 20 ms for a copy, 100 ms for a read, two at once.
class AdapterLoaderTest : public ::testing::Test {
 protected:
  AdapterLoader MakeLoader(std::int64_t num_host_adapters) {
    return AdapterLoader(catalog_, device_.disk_to_host(false), device_.host_to_device(),
                         num_host_adapters * catalog_.MaxBytes());
  }

  DeviceModel device_ = MakeDevice();
  AdapterCatalog catalog_{device_, 10, {16}};
};

using Ids = std::vector<std::int64_t>;

TEST_F(AdapterLoaderTest, CopiesFollowEachOtherOnOneEngine) {
  AdapterLoader loader = MakeLoader(0);
  loader.Start(3, 1000);
  loader.Start(1, 1000);
  EXPECT_EQ(loader.NextEventUs(), 21'000);
  loader.AdvanceTo(20'999);
  EXPECT_TRUE(loader.TakeLoaded().empty());
  loader.AdvanceTo(21'000);
  EXPECT_EQ(loader.TakeLoaded(), Ids{3});
  EXPECT_EQ(loader.NextEventUs(), 41'000);
  loader.AdvanceTo(50'000);
  EXPECT_EQ(loader.TakeLoaded(), Ids{1});
  EXPECT_EQ(loader.NextEventUs(), kNever);
  EXPECT_EQ(loader.num_host_loads(), 2);
}

TEST_F(AdapterLoaderTest, ReadsRunBesideCopiesInAFewThreads) {
  AdapterLoader loader = MakeLoader(4);  // 1 to 4 are on the host
  for (const std::int64_t id : {1, 5, 6, 7}) loader.Start(id, 0);
  loader.AdvanceTo(20'000);
  EXPECT_EQ(loader.TakeLoaded(), Ids{1});  // it does not wait for those from disk
  loader.AdvanceTo(140'000);
  EXPECT_EQ(loader.TakeLoaded(), (Ids{5, 6}));
  loader.AdvanceTo(219'999);
  EXPECT_TRUE(loader.TakeLoaded().empty());  // two threads: the third read starts at 100 ms
  loader.AdvanceTo(220'000);
  EXPECT_EQ(loader.TakeLoaded(), Ids{7});
  EXPECT_EQ(loader.num_disk_loads(), 3);
  EXPECT_EQ(loader.num_host_loads(), 1);
}

TEST_F(AdapterLoaderTest, WhatIsReadAheadIsThenOnTheHostAndNotCopied) {
  AdapterLoader loader = MakeLoader(2);  // 1 and 2 are on the host
  const auto any = [](std::int64_t) { return true; };
  EXPECT_FALSE(loader.ReadAhead(5, 0, [](std::int64_t) { return false; })) << "there is no room";
  EXPECT_TRUE(loader.ReadAhead(5, 0, any));
  EXPECT_TRUE(loader.IsOnHost(5)) << "on its way";
  EXPECT_TRUE(loader.ReadAhead(6, 0, any));
  EXPECT_FALSE(loader.ReadAhead(7, 0, any)) << "two are read at once";
  using Change = AdapterLoader::HostChange;
  EXPECT_EQ(loader.TakeHostChanges(), (std::vector<Change>{{1, false}, {2, false}}));
  loader.AdvanceTo(100'000);
  EXPECT_EQ(loader.TakeHostChanges(), (std::vector<Change>{{5, true}, {6, true}}));
  EXPECT_EQ(loader.NextEventUs(), kNever);
  EXPECT_TRUE(loader.TakeLoaded().empty());
  EXPECT_TRUE(loader.ReadAhead(7, 100'000, any)) << "5 and 6 hold their room no longer";
  loader.Start(6, 100'000);
  loader.AdvanceTo(120'000);
  EXPECT_EQ(loader.TakeLoaded(), Ids{6});
  EXPECT_EQ(loader.num_disk_loads(), 3);
  EXPECT_EQ(loader.num_host_loads(), 1);
}

TEST_F(AdapterLoaderTest, TheHostKeepsThoseUsedLast) {
  AdapterLoader loader = MakeLoader(2);  // 1 and 2 are on the host
  loader.Start(1, 0);
  loader.AdvanceTo(1'000'000);
  loader.Start(3, 1'000'000);  // takes the room of 2
  using Changes = std::vector<AdapterLoader::HostChange>;
  EXPECT_EQ(loader.TakeHostChanges(), (Changes{{2, false}}));
  EXPECT_FALSE(loader.IsOnHost(2));
  loader.AdvanceTo(2'000'000);
  EXPECT_EQ(loader.TakeHostChanges(), (Changes{{3, true}}));
  loader.Start(1, 2'000'000);
  loader.Start(2, 2'000'000);
  EXPECT_EQ(loader.num_host_loads(), 2);
  EXPECT_EQ(loader.num_disk_loads(), 2);
}

TEST_F(AdapterLoaderTest, AReadWaitsForRoomThatCopiesHold) {
  AdapterLoader loader = MakeLoader(1);
  loader.Start(1, 0);
  loader.Start(2, 0);  // the only room holds 1 until its copy has ended
  EXPECT_EQ(loader.NextEventUs(), 20'000);
  loader.AdvanceTo(20'000);
  EXPECT_EQ(loader.NextEventUs(), 120'000);
  loader.AdvanceTo(140'000);
  EXPECT_EQ(loader.TakeLoaded(), (Ids{1, 2}));
}

TEST_F(AdapterLoaderTest, StepsAreSlowerWhileACopyIsUnderWay) {
  const DeviceModel device =
      MakeDevice(testing::kSimpleDevice + "loads.host_to_device.step_slowdown=0.5\n");
  AdapterLoader loader(catalog_, device.disk_to_host(false), device.host_to_device(), 0);
  EXPECT_EQ(loader.StepFactor(), 1.0);
  loader.Start(1, 0);
  EXPECT_EQ(loader.StepFactor(), 1.5);
  loader.AdvanceTo(20'000);
  EXPECT_EQ(loader.StepFactor(), 1.0);
}

}  // namespace
}  // namespace lora_serve::sim
