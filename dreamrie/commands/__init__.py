"""Commands on adapter files: info, convert, truncate, merge, diff need no model; verify and others load one."""
