"""Tests, mirroring dreamrie/ one to one."""
