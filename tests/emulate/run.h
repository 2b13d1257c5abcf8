// run.h: after the kernels of a variant, whose table KERNELS lists by the numbers of plan.h.
namespace emulated {

using Kernel = void (*)(const void*);
template <class Launch, void (*kKernel)(const Launch)>
static void call(const void* launch) {
  kKernel(*(const Launch*)launch);
}
static const Kernel kernels[] = {KERNELS};
static Kernel kernel;
static const void* launch;

static void run_thread() { kernel(launch); }

}  // namespace emulated

// Runs one launch; null, or what went wrong.
extern "C" const char* qk_emulate(int function, const unsigned* grid, const unsigned* block,
                                  const void* launch) {
  using namespace emulated;
  kernel = kernels[function], start = run_thread;
  for (Lane& lane : lanes) lane.begun = false;  // a run that failed left it in the middle
  emulated::launch = launch;
  problem = kernel ? nullptr : "no such kernel";
  if (block[0] != kWarp || block[1] * kWarp > kMost || block[2] != 1) problem = "block";
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
  struct sigaction action = {}, before;
  action.sa_handler = trap;
  action.sa_flags = SA_NODEFER;
  sigaction(SIGILL, &action, &before);
  if (sigsetjmp(trapped, 1)) {
    problem = "a load or store that is not aligned to its type";
  } else {
    for (unsigned z = 0; z < grid[2] && !problem; ++z)
      for (unsigned y = 0; y < grid[1] && !problem; ++y)
        for (unsigned x = 0; x < grid[0] && !problem; ++x) {
          blockIdx = {x, y, z};
          run_block(block[1] * kWarp);
        }
  }
  sigaction(SIGILL, &before, nullptr);
  return problem;
}
