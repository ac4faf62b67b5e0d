"""Other frameworks, a module each; none is imported before its module is."""
