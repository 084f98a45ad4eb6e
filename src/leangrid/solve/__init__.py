"""The mathematics of one group of linears: Hessian, factor, correction, sweep, refinement. Tensors in, tensors out."""
