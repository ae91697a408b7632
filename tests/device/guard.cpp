// What autograd asks about devices, answered for two that do not exist: the current one is a number of each thread, streams are one.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceType kind = c10::DeviceType::CUDA;
constexpr c10::DeviceIndex devices = 2;
thread_local c10::DeviceIndex current = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}

  c10::DeviceType type() const override { return kind; }
  c10::DeviceIndex deviceCount() const noexcept override { return devices; }

  c10::Device getDevice() const override { return {kind, current}; }
  void setDevice(c10::Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  c10::Device exchangeDevice(c10::Device to) const override {
    const c10::Device before = getDevice();
    setDevice(to);
    return before;
  }

  c10::Stream getStream(c10::Device of) const override { return c10::Stream(c10::Stream::DEFAULT, of); }
  c10::Stream getNewStream(c10::Device of, int) const override { return getStream(of); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace
