#include "mixture.cuh"

namespace vcrd::cuda {

template const char* launch_mixture_sums<__half>(const MixtureParams&, int64_t, cudaStream_t);

}  // namespace vcrd::cuda
