// Runs the kernels of isa_generic.cpp with no torch, for a processor that an emulator plays: reads
// the inputs of one call from stdin, raw and in order, and writes its results to stdout.
//
//   arm DTYPE attention B H S D causal     query key value dout -> out lse dquery dkey dvalue
//   arm DTYPE norm R C                     x weight dy -> y dx dweight
//   arm DTYPE softmax R C                  x dy -> y dx
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace fastattn {

const Kernels& kernels() { return generic::kernels.table; }

void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}
Memory::~Memory() { std::free(data_); }
float* Memory::reserve(int64_t floats) {
  if (data_ != nullptr && floats <= floats_) return data_;
  std::free(data_);
  floats_ = (floats + 1024) / 1024 * 1024;
  return data_ = static_cast<float*>(std::aligned_alloc(64, floats_ * sizeof(float)));
}
float* thread_scratch(int slot, int64_t floats) {
  static Memory buffers[16];
  return buffers[slot].reserve(floats);
}

}  // namespace fastattn

using namespace fastattn;

static Dtype dtype;
static std::vector<std::unique_ptr<char[]>> held;
static int64_t bytes(Dtype type) { return type == Dtype::f32 ? 4 : 2; }

static char* zeros(int64_t entries, Dtype type) {
  held.emplace_back(new char[entries * bytes(type) + 64]());
  return held.back().get();
}
static char* input(int64_t entries, Dtype type) {
  char* data = zeros(entries, type);
  const size_t wanted = entries * bytes(type);
  if (std::fread(data, 1, wanted, stdin) != wanted) std::exit(3);
  return data;
}
static void output(const void* data, int64_t entries, Dtype type) {
  std::fwrite(data, 1, entries * bytes(type), stdout);
}
static RowMap rows(const void* data, int64_t R, int64_t C) {
  RowMap map;
  map.data = data;
  map.dims = 1;
  map.size[0] = R;
  map.stride[0] = C;
  return map;
}

static void attention(int64_t B, int64_t H, int64_t S, int64_t D, bool causal) {
  const int64_t entries = B * H * S * D, lines = B * H * S;
  const auto heads = [&](void* data) { return Heads{data, dtype, H * S * D, S * D, D}; };
  AttentionArgs args{};
  args.B = B;
  args.Hq = args.Hkv = H;
  args.Sq = args.Sk = S;
  args.D = args.Dv = D;
  args.query = heads(input(entries, dtype));
  args.key = heads(input(entries, dtype));
  args.value = heads(input(entries, dtype));
  args.out = heads(zeros(entries, dtype));
  args.lse = reinterpret_cast<float*>(zeros(lines, Dtype::f32));
  args.lse_low = reinterpret_cast<float*>(zeros(lines, Dtype::f32));
  args.lse_batch = H * S;
  args.lse_head = S;
  args.scale = 0.25f;
  args.window_left = kUnlimited;
  args.window_right = causal ? 0 : kUnlimited;
  AttentionGradients grads{};
  grads.dout = heads(input(entries, dtype));
  grads.delta = reinterpret_cast<float*>(zeros(lines, Dtype::f32));
  grads.dquery = heads(zeros(entries, dtype));
  grads.dkey = heads(zeros(entries, dtype));
  grads.dvalue = heads(zeros(entries, dtype));
  kernels().attention_fwd(args);
  kernels().attention_bwd(args, grads);
  output(args.out.data, entries, dtype);
  output(args.lse, lines, Dtype::f32);
  for (const Heads& x : {grads.dquery, grads.dkey, grads.dvalue}) output(x.data, entries, dtype);
}

static void norm(int64_t R, int64_t C) {
  NormArgs args{};
  args.dtype = args.residual_dtype = dtype;
  args.R = R;
  args.C = C;
  args.eps = 1e-5f;
  args.x = rows(input(R * C, dtype), R, C);
  args.weight = {input(C, dtype), dtype};
  args.dy = rows(input(R * C, dtype), R, C);
  char *y = zeros(R * C, dtype), *dx = zeros(R * C, dtype), *dweight = zeros(C, dtype);
  args.y = rows(y, R, C);
  args.dx = rows(dx, R, C);
  args.dweight = dweight;
  args.mean = reinterpret_cast<float*>(zeros(R, Dtype::f32));
  args.rstd = reinterpret_cast<float*>(zeros(R, Dtype::f32));
  kernels().norm_fwd(args);
  kernels().norm_bwd(args);
  output(y, R * C, dtype);
  output(dx, R * C, dtype);
  output(dweight, C, dtype);
}

static void softmax(int64_t R, int64_t C) {
  SoftmaxArgs args{};
  args.dtype = dtype;
  args.R = R;
  args.C = C;
  args.Sq = 1;
  args.scale = 1.f;
  args.x = input(R * C, dtype);
  char *y = zeros(R * C, dtype), *dx = zeros(R * C, dtype);
  args.out = y;
  kernels().softmax_fwd(args);
  args.dy = input(R * C, dtype);
  args.x = y;
  args.out = dx;
  kernels().softmax_bwd(args);
  output(y, R * C, dtype);
  output(dx, R * C, dtype);
}

int main(int count, char** words) {
  if (count < 5) return 2;
  const std::string type = words[1], call = words[2];
  dtype = type == "float32" ? Dtype::f32 : type == "bfloat16" ? Dtype::bf16 : Dtype::f16;
  const auto number = [&](int at) { return at < count ? std::atoll(words[at]) : 0; };
  if (call == "attention") attention(number(3), number(4), number(5), number(6), number(7) != 0);
  if (call == "norm") norm(number(3), number(4));
  if (call == "softmax") softmax(number(3), number(4));
  return 0;
}
