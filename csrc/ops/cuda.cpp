// The operators of fastattn_cuda, on the device and the stream that their caller works on. With
// FASTATTN_HOST they take a CPU's tensors, and the kernels run on the model of a GPU (csrc/host).
#include "tensors.h"
//
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/kernels.h"

#if !defined(FASTATTN_HOST)
#include <dlfcn.h>
#endif

#define FASTATTN_BACKEND cuda_operators

namespace fastattn::cuda_operators {

using cuda::kernels;

// Memory of the call that runs in this thread, until it ends. A GPU's allocator takes it back in
// the order of the stream, hence after the kernels that use it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x);
  ~OnDevice();
  void* scratch(int64_t bytes) {
    held_.push_back(torch::stable::new_empty(anchor_, {bytes}, ScalarType::Byte));
#if defined(FASTATTN_HOST)
    torch::stable::fill_(held_.back(), 0xff);  // NaN, where a kernel reads what it has not written
#endif
    return write(held_.back());
  }

 private:
  const Tensor anchor_;
  std::vector<Tensor> held_;
  OnDevice* const outer_;
#if !defined(FASTATTN_HOST)
  const torch::stable::accelerator::DeviceGuard guard_;
#endif
};

static thread_local OnDevice* active = nullptr;

#if defined(FASTATTN_HOST)

OnDevice::OnDevice(const Tensor& x) : anchor_(x), outer_(active) {
  active = this;
  if (outer_ == nullptr) host::forget_permits();
}
OnDevice::~OnDevice() {
  active = outer_;
  if (outer_ == nullptr) host::forget_permits();
}
constexpr bool kReadsData = true;
static const Tensor& to_host(const Tensor& x) { return x; }

#else

OnDevice::OnDevice(const Tensor& x) : anchor_(x), outer_(active), guard_(x.get_device_index()) {
  active = this;
}
OnDevice::~OnDevice() { active = outer_; }
constexpr bool kReadsData = false;
static Tensor to_host(const Tensor& x) {
  return torch::stable::to(
      x, std::nullopt, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

#endif

}  // namespace fastattn::cuda_operators

namespace fastattn {

void* scratch_bytes(int64_t bytes) { return cuda_operators::active->scratch(bytes); }

#if defined(FASTATTN_HOST)

Stream current_stream() { return nullptr; }

#else

// libtorch_cuda is asked by name: linked, it would keep the extension from loading on a torch
// without CUDA. torch 2.10's stable ABI has no word for a stream's handle.
using GetStream = int32_t (*)(int32_t device, void** stream);
static GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(found != nullptr, "fastattn: this torch has no CUDA streams");
  return reinterpret_cast<GetStream>(found);
}

void* current_stream() {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  const int32_t device = torch::stable::accelerator::getCurrentDeviceIndex();
  STD_TORCH_CHECK(
      get_stream(device, &stream) == 0, "fastattn: no current stream on device ", device);
  return stream;
}

#endif

}  // namespace fastattn

#include "cache-inl.h"
#include "operators-inl.h"

namespace fastattn::cuda_operators {

template <class Library>
void implement_all(Library& m) {
  implement(m);
  m.impl("cache_append_", TORCH_BOX(&cache_append_));
}

}  // namespace fastattn::cuda_operators

#if defined(FASTATTN_HOST)
// Gives torch these operators as name's: libraries made from other sources can be loaded beside.
extern "C" __attribute__((visibility("default"))) void fastattn_host_register(const char* name) {
  using torch::stable::detail::StableLibrary;
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, name, "CPU", __FILE__, __LINE__);
  fastattn::cuda_operators::implement_all(*library);  // for as long as the process lives
}
#else
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, CUDA, m) { fastattn::cuda_operators::implement_all(m); }
#endif
