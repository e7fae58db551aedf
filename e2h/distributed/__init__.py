"""The only package that imports ray: sessions, Ray Data jobs, Ray Train."""
