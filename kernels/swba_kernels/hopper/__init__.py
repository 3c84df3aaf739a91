"""Kernels for Hopper (compute capability 9.0), written in Gluon: TMA, wgmma, warp specialisation."""
