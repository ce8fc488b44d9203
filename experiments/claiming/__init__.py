"""The claims page's parts: what is compiled, where the numbers are kept, what each claim says."""
