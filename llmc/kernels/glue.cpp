// The shared library that ONNX Runtime loads. It is compiled for the baseline of the architecture, unlike the regions:
// on a CPU without their instruction set, loading fails with a message before any of them runs.
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "crew.h"
#include "ort.h"
#include "pieces.h"
#include "program.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

extern "C" const llmc::Domain llmc_domains[];
extern "C" const int32_t llmc_domain_count, llmc_region_count;

namespace llmc {
namespace {

constexpr size_t kMaxThreads = 64;
constexpr size_t kKeptBytes = size_t{64} << 20;  // a larger workspace is freed after the step

#if defined(__x86_64__)
struct Registers {
  unsigned eax, ebx, ecx, edx;
};

/// Bits that report an instruction set in CPUID, and registers that the system must save for it (XCR0); source: Intel's
/// Software Developer's Manual, volume 2A (CPUID) and volume 1 (13.1). The names match /proc/cpuinfo.
/// `__builtin_cpu_supports` would suffice, but it supports none of them in the clang of ziglang.
struct Feature {
  unsigned leaf;
  unsigned Registers::*word;
  unsigned bit;
  unsigned saved;
};
constexpr unsigned kYmm = 0x06, kZmm = 0xe6;
[[maybe_unused]] constexpr Feature fma{1, &Registers::ecx, 12, kYmm}, f16c{1, &Registers::ecx, 29, kYmm},
    avx2{7, &Registers::ebx, 5, kYmm}, avx512f{7, &Registers::ebx, 16, kZmm}, avx512dq{7, &Registers::ebx, 17, kZmm},
    avx512bw{7, &Registers::ebx, 30, kZmm}, avx512vl{7, &Registers::ebx, 31, kZmm},
    avx512_vnni{7, &Registers::ecx, 11, kZmm};

/// Return whether this CPU has every instruction set in LLMC_NEEDS, names separated by commas.
bool cpu_fits() {
  constexpr unsigned kSavesState = 1u << 27;  // leaf 1, ecx: XCR0 can be read
  Registers basic{};
  if (!__get_cpuid(1, &basic.eax, &basic.ebx, &basic.ecx, &basic.edx) || !(basic.ecx & kSavesState)) return false;
  unsigned saved, high;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  for (const Feature& needed : {LLMC_NEEDS}) {
    Registers found{};
    if (!__get_cpuid_count(needed.leaf, 0, &found.eax, &found.ebx, &found.ecx, &found.edx)) return false;
    if (!(found.*needed.word >> needed.bit & 1) || (saved & needed.saved) != needed.saved) return false;
  }
  return true;
}
#elif defined(__aarch64__) && defined(__linux__)
/// Bits of AT_HWCAP, as in Linux's asm/hwcap.h; the names match /proc/cpuinfo.
[[maybe_unused]] constexpr unsigned long asimd = 1ul << 1, asimddp = 1ul << 20;

/// Return whether this CPU has every instruction set in LLMC_NEEDS, names separated by commas.
bool cpu_fits() {
  const unsigned long here = getauxval(AT_HWCAP);
  for (const unsigned long needed : {LLMC_NEEDS})
    if (!(here & needed)) return false;
  return true;
}
#else
#error "compiled kernels are for x86-64, and for AArch64 on Linux"
#endif

/// The memory of one step, kept for the next.
struct Workspace {
  void* data = nullptr;
  size_t size = 0;
};

class Kernel {
 public:
  Kernel(const Api& api, const Region& region) : api_(api), region_(region) {}
  ~Kernel() {
    for (Workspace& w : free_) std::free(w.data);
  }
  Kernel(const Kernel&) = delete;

  OrtStatus* compute(OrtKernelContext* context);

 private:
  OrtStatus* fail(const char* why) const {
    return api_.error(kInvalidArgument, (std::string(region_.name) + ": " + why).c_str());
  }
  OrtStatus* read_shape(const OrtValue* value, Shape& shape) const;
  OrtStatus* make_outputs(OrtKernelContext* context, Run& run, std::vector<void*>& tensors, std::vector<Shape>& shapes);
  OrtStatus* run_pieces(OrtKernelContext* context, Run& run);
  Workspace take(size_t size);
  void put_back(Workspace workspace);

  const Api api_;
  const Region& region_;
  std::mutex mutex_;
  std::vector<Workspace> free_;
  std::atomic<uint32_t> shares_{2};  // the threads that worked on the last step are likely to return
};

/// The data that the threads of one step share.
struct Job {
  Job(const Run& run, uint8_t* scratch, size_t scratch_size, uint32_t shares)
      : run(run), crew(shares), scratch(scratch), scratch_size(scratch_size) {}

  const Run& run;
  Crew crew;
  std::atomic<size_t> threads{0};   // number that have arrived
  std::atomic<uint32_t> workers{0};  // number that found work
  std::atomic<bool> over{false};
  uint8_t* const scratch;
  const size_t scratch_size;
};

int64_t rows_of_chunk(int64_t rows) { return rows <= 64 ? 1 : 8; }

void run_rows(const Run& run, int32_t first, int32_t last, int64_t start, int64_t stop) {
  const Op* ops = run.region->ops;
  for (int64_t row = start; row < stop; row++)
    for (int32_t i = first; i < last; i++)
      if (ops[i].row != nullptr) ops[i].row(run, ops[i], row);
}

/// Operations from `first` to before `last` as one phase of `chunks`; those from `tail` on run in its serial tail.
struct Phase {
  int32_t first, tail, last;
  uint32_t chunks;
};

/// Return the phase that begins with operation `first`, or no chunks after the last one.
Phase next_phase(const Run& run, int32_t first) {
  const Op* ops = run.region->ops;
  const int32_t count = run.region->op_count;
  const auto idle = [&](int32_t i) {  // nothing to do in this piece of the step
    return run.rows(ops[i].space) == 0 || (ops[i].row == nullptr && ops[i].chunks(run, ops[i]) == 0);
  };
  while (first < count && idle(first)) first++;
  Phase phase{first, first, first, 0};
  if (first == count) return phase;
  if (ops[first].row != nullptr) {
    while (phase.last < count && ops[phase.last].row != nullptr && ops[phase.last].space == ops[first].space)
      phase.last++;
    phase.tail = phase.last;
    const int64_t rows = run.rows(ops[first].space), step = rows_of_chunk(rows);
    phase.chunks = static_cast<uint32_t>((rows + step - 1) / step);
  } else {
    phase.chunks = ops[first].chunks(run, ops[first]);
    phase.tail = phase.last = first + 1;
    while (phase.last < count && (idle(phase.last) || (ops[phase.last].row != nullptr &&
                                                       run.rows(ops[phase.last].space) <= kFewRows)))
      phase.last++;
  }
  return phase;
}

void work(void* data, size_t) {
  Job& job = *static_cast<Job*>(data);
  if (job.over.load(std::memory_order_relaxed)) return;
  const size_t me = job.threads.fetch_add(1);
  if (me >= kMaxThreads) return;
  const Run& run = job.run;
  const Op* ops = run.region->ops;
  const uint32_t share = job.crew.share_of(me);
  Scratch scratch{job.scratch + me * job.scratch_size, job.scratch_size};
  bool worked = false;
  Phase now = next_phase(run, 0);
  for (uint32_t index = 0; now.chunks > 0; index++) {
    const Phase next = next_phase(run, now.last);
    const Op& op = ops[now.first];
    worked |= job.crew.phase(
        index, share, now.chunks,
        [&](uint32_t chunk) {
          if (op.row == nullptr) return op.chunk(run, op, chunk, scratch);
          const int64_t rows = run.rows(op.space), step = rows_of_chunk(rows), start = chunk * step;
          run_rows(run, now.first, now.last, start, start + step < rows ? start + step : rows);
        },
        [&] {
          const Op& coming = ops[next.first];
          if (next.chunks > 0 && coming.ahead != nullptr)
            coming.ahead(run, coming, job.crew.first_of(share, next.chunks));
        },
        [&] {
          for (int32_t k = now.tail; k < now.last; k++) run_rows(run, k, k + 1, 0, run.rows(ops[k].space));
        });
    now = next;
  }
  job.over.store(true, std::memory_order_relaxed);
  if (worked) job.workers.fetch_add(1);
}

OrtStatus* Kernel::read_shape(const OrtValue* value, Shape& shape) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* status = api_.shape_of(value, &info)) return status;
  OrtStatus* status = api_.rank(info, &shape.rank);
  for (int64_t& dim : shape.dims) dim = 1;
  if (status == nullptr && shape.rank > kMostDims) status = fail("a tensor has more than 6 dimensions");
  if (status == nullptr) status = api_.dims(info, shape.dims, shape.rank);
  api_.release_shape(info);
  return status;
}

OrtStatus* Kernel::make_outputs(OrtKernelContext* context, Run& run, std::vector<void*>& tensors,
                                std::vector<Shape>& shapes) {
  for (int32_t i = 0; i < region_.output_count; i++) {
    const Output& output = region_.outputs[i];
    Shape shape{{}, static_cast<size_t>(output.rank)};
    for (int64_t& dim : shape.dims) dim = 1;
    for (int32_t d = 0; d < output.rank; d++) {
      const int64_t dim = output.dims[d];
      if (dim == kBatch) {
        shape.dims[d] = run.batch;
      } else if (dim == kSequence) {
        shape.dims[d] = run.sequence;
      } else if (dim == kChosen) {
        shape.dims[d] = run.chosen;
      } else if (dim == kSlots) {
        const int64_t slots = shapes[output.past].dims[2];
        shape.dims[d] = slots > run.total ? slots : run.total;
      } else if (dim < kPerToken) {
        shape.dims[d] = (kPerToken - dim) * run.batch * run.sequence;
      } else {
        shape.dims[d] = dim;
      }
    }
    OrtValue* value = nullptr;
    if (OrtStatus* status = api_.output(context, i, shape.dims, shape.rank, &value)) return status;
    if (OrtStatus* status = api_.data(value, &tensors[region_.inputs + i])) return status;
    shapes[region_.inputs + i] = shape;
  }
  return nullptr;
}

OrtStatus* Kernel::compute(OrtKernelContext* context) {
  const size_t count = region_.inputs + region_.output_count;
  std::vector<void*> tensors(count);
  std::vector<Shape> shapes(count);
  for (int32_t i = 0; i < region_.inputs; i++) {
    const OrtValue* value = nullptr;
    if (OrtStatus* status = api_.input(context, i, &value)) return status;
    if (OrtStatus* status = api_.data(const_cast<OrtValue*>(value), &tensors[i])) return status;
    if (i >= region_.computed) continue;
    if (OrtStatus* status = read_shape(value, shapes[i])) return status;
  }
  const Shape& first = shapes[region_.rows_from];
  const int64_t sequence = first.dims[region_.sequence_at];
  Run run{&region_, tensors.data(), shapes.data(), nullptr, nullptr, first.dims[0], sequence, sequence, 1};
  if (run.batch < 1 || run.sequence < 1) return fail("there are no tokens");
  if (region_.chosen >= 0) run.chosen = shapes[region_.chosen].dims[1];
  if (run.chosen < 1 || run.chosen > run.sequence) return fail("more tokens are chosen than a sequence has, or none");
  if (region_.total >= 0) run.total = *run.tensor<const int32_t>(region_.total);
  if (OrtStatus* status = make_outputs(context, run, tensors, shapes)) return status;
  for (int32_t i = 0; i < region_.op_count; i++) {
    const Op& op = region_.ops[i];
    const char* wrong = op.check == nullptr ? nullptr : op.check(run, op);
    if (wrong != nullptr) return fail(wrong);
  }
  return run_pieces(context, run);
}

OrtStatus* Kernel::run_pieces(OrtKernelContext* context, Run& run) {
  const auto rounded = [](size_t size) { return (size + 4095) / 4096 * 4096; };
  const size_t rows = rounded(sizeof(float) * rows_of_pieces(run) * region_.width);
  const size_t shared = rounded(region_.shared(run)), scratch = rounded(region_.scratch);
  const Workspace workspace = take(rows + shared + scratch * kMaxThreads);
  if (workspace.data == nullptr) return api_.error(kFail, "out of memory for the workspace of a step");
  uint8_t* base = static_cast<uint8_t*>(workspace.data);
  run.workspace = reinterpret_cast<float*>(base);
  run.shared = base + rows;
  std::vector<void*> tensors(region_.inputs + region_.output_count);
  OrtStatus* status = each_piece(run, [&](const Piece& piece) {
    const Run part = cut(run, piece, tensors.data());
    Job job(part, base + rows + shared, scratch, shares_.load(std::memory_order_relaxed));
    OrtStatus* failed = api_.parallel_for(context, work, kMaxThreads, 0, &job);
    shares_.store(job.workers.load(), std::memory_order_relaxed);
    return failed;
  });
  put_back(workspace);
  return status;
}

Workspace Kernel::take(size_t size) {
  Workspace found;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      found = free_.back();
      free_.pop_back();
    }
  }
  if (found.size >= size) return found;
  std::free(found.data);
  return {std::aligned_alloc(4096, size), size};
}

void Kernel::put_back(Workspace workspace) {
  if (workspace.size > kKeptBytes) {
    std::free(workspace.data);
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(workspace);
}

/// One operator: ONNX Runtime's table of functions, then the region that it runs.
struct Operator {
  OrtCustomOp table;
  const Region* region;
};

const Region& region_of(const OrtCustomOp* op) { return *reinterpret_cast<const Operator*>(op)->region; }

OrtStatus* create(const OrtCustomOp* op, const void* table, const OrtKernelInfo*, void** kernel) {
  const Api api(table);
  *kernel = new (std::nothrow) Kernel(api, region_of(op));
  return *kernel != nullptr ? nullptr : api.error(kFail, "out of memory for a kernel");
}

OrtCustomOp make_table() {
  OrtCustomOp t{};
  t.version = kApiVersion;
  t.GetName = [](const OrtCustomOp* op) { return region_of(op).name; };
  t.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  t.GetInputType = [](const OrtCustomOp* op, size_t i) -> int { return region_of(op).input_types[i]; };
  t.GetInputTypeCount = [](const OrtCustomOp* op) -> size_t { return region_of(op).inputs; };
  t.GetOutputType = [](const OrtCustomOp* op, size_t i) -> int { return region_of(op).outputs[i].type; };
  t.GetOutputTypeCount = [](const OrtCustomOp* op) -> size_t { return region_of(op).output_count; };
  t.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  t.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
  t.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
  t.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  t.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  t.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  t.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  t.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  t.CreateKernelV2 = create;
  t.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return static_cast<Kernel*>(kernel)->compute(context);
  };
  t.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  t.GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
  return t;
}

/// Return the operators of all domains, domain after domain; they live as long as the library.
const std::vector<Operator>& operators() {
  static const std::vector<Operator>* const list = [] {
    auto* made = new std::vector<Operator>;
    for (int32_t d = 0; d < llmc_domain_count; d++)
      for (int32_t i = 0; i < llmc_region_count; i++) made->push_back({make_table(), &llmc_domains[d].regions[i]});
    return made;
  }();
  return *list;
}

OrtStatus* add_domain(const Api& api, OrtSessionOptions* options, int32_t index) {
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* status = api.create_domain(llmc_domains[index].name, &domain)) return status;
  for (int32_t i = 0; i < llmc_region_count; i++)
    if (OrtStatus* status = api.add_operator(domain, &operators()[index * llmc_region_count + i].table)) return status;
  return api.add_domain(options, domain);
}

}  // namespace
}  // namespace llmc

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const llmc::OrtApiBase* base) {
  using namespace llmc;
  const void* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    const std::string text = std::string("compiled operators need ONNX Runtime 1.17 or later; this is ") +
                             base->GetVersionString();
    return Api(base->GetApi(1)).error(kFail, text.c_str());
  }
  const Api api(table);
  if (!cpu_fits())
    return api.error(kFail, "this model is compiled for CPUs with " LLMC_ISA "; this CPU does not support it");
  for (int32_t d = 0; d < llmc_domain_count; d++)
    if (OrtStatus* status = add_domain(api, options, d)) return status;
  return nullptr;
}
