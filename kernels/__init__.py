"""Triton kernels, installed as fastflow.kernels: one file per op, of the same name as in fastflow.ops."""
