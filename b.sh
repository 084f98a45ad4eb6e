F="-O3 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti -Wno-psabi -I/tmp/wt/affine/src/leangrid/kernels/cpu"
g++ $F -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512 h.cpp -o h512 $1
g++ $F -mavx2 -mfma h.cpp -o h2 $1
g++ $F h.cpp -o h1 $1
