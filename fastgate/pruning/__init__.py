"""Decide, freeze, compact, save: the steps from a gated network to a plain one."""
