"""Tests on a device that is not the CPU, for machines that have no other."""
