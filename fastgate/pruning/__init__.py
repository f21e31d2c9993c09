"""Decide, freeze, compact, save: from a gated network to a plain one."""
