// A simulated accelerator: two devices whose memory is the host's and whose kernels are the CPU's.
//
// PyTorch reserves one device type, PrivateUse1, for backends that it does not know. This file fills it:
//   memory     an allocator that accounts for every byte, refuses beyond a limit, and poisons what it gives and takes
//   devices    a guard and hooks: the current device, streams and events (all work is done at once), generators
//   operations one function for all of them: it checks the devices of the arguments, lends their memory to the CPU's
//              kernel, and brings the results to the device
//   counters   copies by direction, synchronisations by cause, operations by name
// Python reaches it through `torch.ops.simulated`; backend.py beside this file is the interface for tests.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/enum_tag.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_set>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using Stack = torch::jit::Stack;

constexpr auto kSimulated = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex kDevices = 2;
constexpr int kPoison = 0xFF;  // every float of these bytes is NaN
constexpr size_t kHeader = 64;  // before each block of memory; keeps the alignment that CPU kernels like

thread_local DeviceIndex current_device = 0;  // autograd has a thread of its own for each device

Device device_at(DeviceIndex index) {
  TORCH_CHECK(index < kDevices, "simulated: invalid device ", int(index), ", there are ", int(kDevices));
  return Device(kSimulated, index < 0 ? current_device : index);
}

// ---------------------------------------------------------------------------------------------------- counters

std::mutex guard_of_counts;
std::atomic<bool> counting{false};
std::map<std::string, int64_t> counts;  // "copies host to device", "bytes ...", "waits for ...", "runs ..."

void count(const std::string& name, int64_t amount = 1) {
  if (!counting) return;
  std::lock_guard<std::mutex> lock(guard_of_counts);
  counts[name] += amount;
}

// ------------------------------------------------------------------------------------------------------ memory

struct Memory {
  c10::CachingAllocator::Stat bytes;
  c10::CachingAllocator::Stat blocks;
  int64_t limit = int64_t(16) << 30;
  int64_t out_of_memory = 0;
};

struct Failure {  // "fail the n-th allocation of at least this many bytes"
  int64_t in_allocations = 0;  // 0: none
  int64_t at_least = 0;
  int64_t seen = 0;
};

struct Header {
  size_t size;
  DeviceIndex device;
};

std::mutex guard_of_memory;
std::array<Memory, kDevices> memory;
Failure failure;

void release(void* block) {
  auto header = *static_cast<Header*>(block);
  std::memset(static_cast<char*>(block) + kHeader, kPoison, header.size);
  {
    std::lock_guard<std::mutex> lock(guard_of_memory);
    memory[header.device].bytes.decrease(header.size);
    memory[header.device].blocks.decrease(1);
  }
  c10::free_cpu(block);
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    auto device = device_at(-1);
    if (size == 0) return {nullptr, device};
    {
      std::lock_guard<std::mutex> lock(guard_of_memory);
      auto& here = memory[device.index()];
      bool chosen = false;
      if (int64_t(size) >= failure.at_least) {
        failure.seen += 1;
        chosen = failure.in_allocations > 0 && --failure.in_allocations == 0;
      }
      if (chosen || here.bytes.current + int64_t(size) > here.limit) {
        here.out_of_memory += 1;
        TORCH_CHECK_WITH(OutOfMemoryError, false, "simulated out of memory. Tried to allocate ", size, " bytes. Device ",
                         int(device.index()), " has a total capacity of ", here.limit, " bytes of which ",
                         here.limit - here.bytes.current, " are free", chosen ? " (this allocation was told to fail)." : ".");
      }
      here.bytes.increase(size);
      here.blocks.increase(1);
    }
    auto* block = static_cast<char*>(c10::alloc_cpu(size + kHeader));
    *reinterpret_cast<Header*>(block) = {size, device.index()};
    std::memset(block + kHeader, kPoison, size);  // what torch.empty returns is used by nobody unseen
    return {block + kHeader, block, &release, device};
  }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }

  // What torch.accelerator's memory functions ask for.
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(guard_of_memory);
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0] = stats.reserved_bytes[0] = stats.active_bytes[0] = memory[device].bytes;
    stats.allocation[0] = stats.active[0] = memory[device].blocks;
    stats.num_ooms = memory[device].out_of_memory;
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(guard_of_memory);
    memory[device].bytes.reset_accumulated();
    memory[device].blocks.reset_accumulated();
  }
  void resetPeakStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(guard_of_memory);
    memory[device].bytes.reset_peak();
    memory[device].blocks.reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(guard_of_memory);
    auto& here = memory[device];
    return {size_t(std::max<int64_t>(0, here.limit - here.bytes.current)), size_t(here.limit)};
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kSimulated, &allocator);

// Host memory that a device copies from and to without the host waiting; the addresses are kept to be recognised.
std::unordered_set<const void*> pinned;

struct PinnedAllocator final : c10::Allocator {
  static void release(void* block) {
    {
      std::lock_guard<std::mutex> lock(guard_of_memory);
      pinned.erase(block);
    }
    c10::free_cpu(block);
  }
  c10::DataPtr allocate(size_t size) override {
    auto* block = c10::alloc_cpu(size);
    std::lock_guard<std::mutex> lock(guard_of_memory);
    pinned.insert(block);
    return {block, block, &PinnedAllocator::release, Device(c10::kCPU)};
  }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
};

PinnedAllocator pinned_allocator;

bool is_pinned(const void* block) {
  std::lock_guard<std::mutex> lock(guard_of_memory);
  return pinned.count(block) > 0;
}

// ----------------------------------------------------------------------------------------------------- devices

// Work is done when it is asked for, so streams and events have names only; waiting for them is counted.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSimulated; }
  Device exchangeDevice(Device device) const override {
    auto before = device_at(-1);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return device_at(-1); }
  void setDevice(Device device) const override { current_device = device_at(device.index()).index(); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Stream getStream(Device device) const override { return getDefaultStream(device); }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device_at(device.index()));
  }
  c10::Stream getNewStream(Device device, int) const override {
    static std::atomic<c10::StreamId> last{0};
    return c10::Stream(c10::Stream::UNSAFE, device_at(device.index()), ++last);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getDefaultStream(stream.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { count("waits for stream"); }
  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {
    static char recorded;
    *event = &recorded;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { count("waits for event"); }
  void synchronizeDevice(DeviceIndex) const override { count("waits for device"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// The CPU's generator under another device's name: its state has the same form.
struct Generator final : at::CPUGeneratorImpl {
  Generator(Device device, uint64_t seed) : at::CPUGeneratorImpl(seed) {
    device_ = device;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_, 0);
    copy->set_state(*get_state());
    return copy;
  }
};

const at::Generator& default_generator(DeviceIndex index) {
  static std::array<at::Generator, kDevices> generators{
      at::make_generator<Generator>(Device(kSimulated, 0), c10::detail::getNonDeterministicRandom()),
      at::make_generator<Generator>(Device(kSimulated, 1), c10::detail::getNonDeterministicRandom())};
  return generators[device_at(index).index()];
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex device) const override { current_device = device_at(device).index(); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    auto before = current_device;
    setCurrentDevice(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(device_at(index), c10::default_rng_seed_val);
  }
  Device getDeviceFromPtr(void*) const override { return device_at(-1); }
  bool isPinnedPtr(const void* block) const override { return is_pinned(block); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    c10::DeviceGuard on(storage.device());
    auto block = allocator.allocate(size);
    auto kept = std::min(size, storage.nbytes());
    if (kept) std::memcpy(block.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(block));  // releases, and so poisons, the old block
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// -------------------------------------------------------------------------------------------------- operations

// A tensor of the CPU in the memory of a tensor on a device.
Tensor lend(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kSimulated) return tensor;
  auto& storage = tensor.storage();
  if (tensor.numel()) {
    auto needed = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size(),
                                                   tensor.storage_offset());
    TORCH_CHECK(storage.nbytes() >= needed, "simulated: the storage of a tensor was freed: it has ", storage.nbytes(),
                " of ", needed, " bytes");
  }
  c10::Storage lent(c10::Storage::use_byte_size_t(), storage.nbytes(),
                    c10::DataPtr(storage.mutable_data(), Device(c10::kCPU)), nullptr, false);
  auto cpu = at::detail::make_tensor<c10::TensorImpl>(std::move(lent), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                      tensor.dtype());
  auto* implementation = cpu.unsafeGetTensorImpl();
  implementation->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_complex()) implementation->_set_conj(tensor.is_conj());
  implementation->_set_neg(tensor.is_neg());
  return cpu;
}

// Copies a new tensor of the CPU, a kernel's result, to the current device. It does not count: nothing crosses a bus.
Tensor bring(const Tensor& cpu) {
  auto on_device = at::empty_strided(cpu.sizes(), cpu.strides(), cpu.options().device(device_at(-1)));
  if (cpu.numel()) std::memcpy(on_device.mutable_data_ptr(), cpu.const_data_ptr(), on_device.storage().nbytes());
  return on_device;
}

// A view of the memory of `base` with the shape of a view that a CPU kernel made.
Tensor view_like(const Tensor& base, const Tensor& cpu) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                       base.key_set(), cpu.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  return view;
}

// Runs CPU kernels on the random numbers of a device: the state of its generator is lent to the CPU's and taken back.
struct LentGenerator {
  explicit LentGenerator(at::Generator device) : device_(std::move(device)) {
    cpu_state_ = cpu().get_state();
    cpu().set_state(Tensor(device_.unsafeGetGeneratorImpl()->get_state()));
  }
  ~LentGenerator() {
    device_.set_state(cpu().get_state());
    cpu().set_state(cpu_state_);
  }
  static at::Generator cpu() { return at::detail::getDefaultCPUGenerator(); }
  at::Generator device_;
  Tensor cpu_state_;
};

const std::unordered_set<std::string> kReadOnHost{
    "aten::nonzero",    "aten::masked_select", "aten::equal",    "aten::_unique",  "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount"};
const std::unordered_set<std::string> kViews{"aten::view", "aten::as_strided", "aten::_reshape_alias", "aten::unfold",
                                             "aten::view_as_real", "aten::view_as_complex"};
const std::unordered_set<std::string> kIndexed{"aten::index", "aten::index_put", "aten::index_put_",
                                               "aten::_index_put_impl_"};

// Every operation that has no function of its own below.
void compute(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto number = schema.arguments().size();
  const auto first = stack->size() - number;
  const bool indexed = kIndexed.count(name) > 0;
  const bool pointwise = op.hasTag(at::Tag::pointwise);
  bool random = op.hasTag(at::Tag::nondeterministic_seeded);
  bool reads_mask = false;

  // 1. All arguments are on one device. As on CUDA, a number may come from the CPU as a tensor of no dimensions where
  // the operation takes numbers, and so may the tensors that are indices.
  std::optional<Device> device;
  auto check = [&](const Tensor& tensor, bool is_index, bool written, bool is_value) {
    if (!tensor.defined()) return;
    const bool is_mask = tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
    reads_mask |= is_index && is_mask && name != "aten::index";  // before aten::index itself runs aten::nonzero
    const bool is_number = tensor.dim() == 0 && (pointwise || is_value || tensor.unsafeGetTensorImpl()->is_wrapped_number());
    if (tensor.is_cpu() && !written && (is_index || is_number)) return;
    if (!device) device = tensor.device();
    TORCH_CHECK(*device == tensor.device(), "Expected all tensors to be on the same device, but found at least two: ",
                *device, " and ", tensor.device(), " (in ", name, ")");
  };
  for (size_t i = 0; i < number; ++i) {
    const auto& argument = (*stack)[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias && alias->isWrite();
    if (argument.isTensor()) check(argument.toTensor(), false, written, indexed && i == 2);
    if (argument.isTensorList())
      for (const Tensor& tensor : argument.toTensorVector()) check(tensor, indexed, written, false);
    if (argument.isOptionalTensorList())
      for (const std::optional<Tensor>& tensor : argument.toOptionalTensorVector())
        if (tensor) check(*tensor, indexed, written, false);
    if (argument.isDevice() && !device) device = argument.toDevice();
    random |= argument.isGenerator();
  }
  auto target = device && device->type() == kSimulated ? device_at(device->index()) : device_at(-1);
  c10::DeviceGuard on(target);
  if (!kViews.count(name)) count("runs " + name);
  if (kReadOnHost.count(name)) count("waits for " + name);
  if (reads_mask) count("waits for the size of a mask");

  // 2. The CPU's kernel runs in the memory of the device's tensors. `lent` says whose each is.
  std::vector<std::pair<Tensor, Tensor>> lent;   // a CPU tensor and the device's
  std::vector<std::pair<Tensor, Tensor>> empty;  // outputs whose size the kernel decides
  std::optional<at::Generator> generator;
  auto lend_argument = [&](const Tensor& tensor, bool written) {
    if (!tensor.defined() || tensor.device().type() != kSimulated) return tensor;
    if (written && tensor.numel() == 0) {
      auto cpu = at::empty(tensor.sizes(), tensor.options().device(c10::kCPU));
      empty.emplace_back(cpu, tensor);
      return cpu;
    }
    lent.emplace_back(lend(tensor), tensor);
    return lent.back().first;
  };
  for (size_t i = 0; i < number; ++i) {
    auto& argument = (*stack)[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias && alias->isWrite();
    if (argument.isTensor()) {
      argument = lend_argument(argument.toTensor(), written);
    } else if (argument.isTensorList()) {
      c10::List<Tensor> tensors;
      for (const Tensor& tensor : argument.toTensorVector()) tensors.push_back(lend_argument(tensor, written));
      argument = std::move(tensors);
    } else if (argument.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (const std::optional<Tensor>& tensor : argument.toOptionalTensorVector())
        tensors.push_back(tensor ? std::optional<Tensor>(lend_argument(*tensor, written)) : std::nullopt);
      argument = std::move(tensors);
    } else if (argument.isDevice()) {
      argument = Device(c10::kCPU);
    } else if (argument.isGenerator()) {
      generator = argument.toGenerator();
      TORCH_CHECK(generator->device() == target, "Expected a generator of ", target, " but found one of ",
                  generator->device(), " (in ", name, ")");
      argument = c10::IValue();
    }
  }
  {
    std::optional<LentGenerator> numbers;
    if (random) numbers.emplace(generator ? *generator : default_generator(target.index()));
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }

  // 3. Results: an argument itself, a view of one, or a new tensor.
  for (auto& [cpu, tensor] : empty) {
    if (!cpu.numel()) continue;
    tensor.resize_(cpu.sizes());
    lend(tensor).copy_(cpu);
  }
  auto result_of = [&](const Tensor& cpu) {
    if (!cpu.defined()) return cpu;
    for (auto& [other, tensor] : empty)
      if (cpu.is_same(other)) return tensor;
    for (auto& [other, tensor] : lent) {
      if (cpu.is_same(other)) return tensor;
      if (cpu.storage().is_alias_of(other.storage()) && cpu.storage().unsafeGetStorageImpl() == other.storage().unsafeGetStorageImpl())
        return view_like(tensor, cpu);
    }
    return bring(cpu);
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& result = (*stack)[i];
    if (result.isTensor()) {
      result = result_of(result.toTensor());
    } else if (result.isTensorList()) {
      c10::List<Tensor> tensors;
      for (const Tensor& tensor : result.toTensorVector()) tensors.push_back(result_of(tensor));
      result = std::move(tensors);
    }
  }
}

Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard on(device_at(device ? device->index() : -1));
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard on(device_at(device ? device->index() : -1));
  return at::detail::empty_strided_generic(sizes, strides, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(c10::get_default_dtype_as_scalartype()));
}

// The one operation between devices. As on CUDA the values cross in the target's precision, and the host waits for a
// copy from or to its memory unless it is pinned and `non_blocking` was asked for.
Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (target.numel() == 0) return target;
  if (source.device() == target.device()) {
    count("runs aten::copy_");
  } else {
    const std::string way = source.is_cpu()   ? "host to device"
                            : target.is_cpu() ? "device to host"
                                              : "device to device";
    count("copies " + way);
    count("bytes " + way, target.numel() * target.element_size());
    if (source.is_cpu() || target.is_cpu()) {
      auto& host = source.is_cpu() ? source : target;
      if (!non_blocking || !is_pinned(host.storage().data())) count("waits for copy " + way);
    }
  }
  lend(target).copy_(lend(source));
  return target;
}

at::Scalar item(const Tensor& tensor) {
  count("waits for item");
  return lend(tensor).item();
}

const Tensor& resize_(const Tensor& tensor, c10::IntArrayRef sizes, std::optional<c10::MemoryFormat>) {
  auto needed = at::detail::computeStorageNbytesContiguous(sizes, tensor.element_size(), tensor.storage_offset());
  if (tensor.storage().nbytes() < needed) Hooks().resizePrivateUse1Bytes(tensor.storage(), needed);
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

Tensor& set_storage(Tensor& tensor, c10::Storage storage, int64_t offset, c10::IntArrayRef sizes,
                    c10::IntArrayRef strides) {
  auto* implementation = tensor.unsafeGetTensorImpl();
  implementation->set_storage_keep_dtype(std::move(storage));
  implementation->set_storage_offset(offset);
  if (strides.empty() && !sizes.empty())
    implementation->set_sizes_contiguous(sizes);
  else
    implementation->set_sizes_and_strides(sizes, strides);
  return tensor;
}

Tensor& set_whole_storage(Tensor& tensor, c10::Storage storage) {
  int64_t size = storage.nbytes() / tensor.element_size();
  return set_storage(tensor, std::move(storage), 0, {size}, {1});
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  return set_storage(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                   c10::IntArrayRef output_padding, int64_t groups) {
  for (const Tensor& other : {weight, bias.value_or(Tensor())})
    TORCH_CHECK(!other.defined() || other.device() == input.device(), "Expected all tensors to be on the same device, "
                "but found at least two: ", input.device(), " and ", other.device(), " (in aten::convolution)");
  c10::DeviceGuard on(input.device());
  count("runs aten::convolution");
  return bring(at::convolution(lend(input), lend(weight), bias ? std::optional<Tensor>(lend(*bias)) : bias, stride,
                               padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> wanted) {
  c10::DeviceGuard on(input.device());
  count("runs aten::convolution_backward");
  std::vector<int64_t> bias_sizes{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [a, b, c] = at::convolution_backward(lend(gradient), lend(input), lend(weight), bias_sizes, stride, padding,
                                            dilation, transposed, output_padding, groups, wanted);
  auto back = [](const Tensor& cpu) { return cpu.defined() ? bring(cpu) : cpu; };
  return {back(a), back(b), back(c)};
}

// Whole numbers too, as on CUDA: mixtures of experts count the tokens of each by it.
Tensor histogram(const Tensor& tensor, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  c10::DeviceGuard on(tensor.device());
  count("runs aten::histc");
  if (low.equal(high.toDouble())) count("waits for histc");  // its range is that of the values
  return bring(lend(tensor).to(at::kDouble).histc(bins, low, high).to(tensor.scalar_type()));
}

void record_stream(Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

// A copy of a conjugate or negative view is what resolves it, so it takes the view as it is.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", item);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("histc", histogram);
  m.impl("record_stream", record_stream);
}

// ------------------------------------------------------------------------------------------ what backend.py calls

TORCH_LIBRARY(simulated, m) {
  m.def("set_memory_limit(int device, int bytes) -> ()", [](int64_t device, int64_t bytes) {
    std::lock_guard<std::mutex> lock(guard_of_memory);
    memory.at(device).limit = bytes;
  });
  m.def("fail_allocation(int number, int at_least) -> ()", [](int64_t number, int64_t at_least) {
    std::lock_guard<std::mutex> lock(guard_of_memory);
    failure = {number, at_least, 0};
  });
  m.def("allocations_seen() -> int", []() { return failure.seen; });
  m.def("start_counting() -> ()", []() {
    std::lock_guard<std::mutex> lock(guard_of_counts);
    counts.clear();
    counting = true;
  });
  m.def("stop_counting() -> Dict(str, int)", []() {
    std::lock_guard<std::mutex> lock(guard_of_counts);
    counting = false;
    c10::Dict<std::string, int64_t> result;
    for (auto& [name, number] : counts) result.insert(name, number);
    return result;
  });
  m.def("get_rng_state(int device) -> Tensor", [](int64_t device) { return default_generator(device).get_state(); });
  m.def("set_rng_state(Tensor state, int device) -> ()", [](const Tensor& state, int64_t device) {
    auto generator = default_generator(device);
    generator.set_state(state);
  });
  m.def("seed(int seed, int device) -> ()", [](int64_t seed, int64_t device) {
    auto generator = default_generator(device);
    generator.set_current_seed(seed);
  });
  m.def("initial_seed(int device) -> int", [](int64_t device) { return int64_t(default_generator(device).current_seed()); });
}

}  // namespace
