"""Devices: the mesh, shardings, and compilers for devices that are not here."""
