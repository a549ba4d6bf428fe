// Test only: the host side of csrc/cuda/launch.h, with blocks one after the other.
#pragma once

namespace pk {

inline int32_t current_device(Device& device) {
  device.major = pk_emulation::machine.major;
  device.shared_optin = (device.major == 8 ? 163 : device.major == 12 ? 99 : 227) * 1024;
  return 0;
}

template <class... Parameters, class... Arguments>
int32_t launch(void (*kernel)(Parameters...), const Shape& shape, void*, Arguments... arguments) {
  auto& machine = pk_emulation::machine;
  Device device;
  current_device(device);
  if (shape.blocks == 0) return 0;
  const bool clusters =
      shape.cluster == 1 || (device.major >= 9 && shape.cluster <= machine.max_cluster);
  if (shape.blocks < 0 || shape.blocks > kMaxBlocks || shape.blocks % shape.cluster != 0 ||
      !clusters || shape.threads % 32 != 0 || shape.threads > 1024 ||
      shape.shared > size_t(device.shared_optin))
    return kInvalidValue;
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.block_dim = {unsigned(shape.threads)};
  machine.body = [=] { kernel(Parameters(arguments)...); };
  for (int64_t block = 0; block < shape.blocks; block += shape.cluster) {
    const int64_t first = machine.backward ? shape.blocks - shape.cluster - block : block;
    pk_emulation::run_cluster(first, shape.cluster, shape.threads, shape.shared);
  }
  return 0;
}

}  // namespace pk
