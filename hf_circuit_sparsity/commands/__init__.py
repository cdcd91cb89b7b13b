"""What the command line does, one file per command; each is a plain function to call as well."""
