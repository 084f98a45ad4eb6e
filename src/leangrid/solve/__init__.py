"""The mathematics of one group of linears: Hessian, factor, correction, sweep and refinement of tensors."""
