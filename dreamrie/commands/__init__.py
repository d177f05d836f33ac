"""Commands on adapter files that need no model: info, convert, truncate, merge, diff."""
