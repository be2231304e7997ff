# llama-cpp-python needs none of llama.cpp's command-line helpers, half of what there is to compile.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
