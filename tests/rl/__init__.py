"""Names of test files here may be those of test files elsewhere."""
