#include "statistics.cuh"

namespace vcrd::cuda {

template const char* launch_row_statistics<__half>(const StatisticsParams&, int64_t, cudaStream_t);

}  // namespace vcrd::cuda
