"""The version of jlora, in one place for the package and its metadata."""

VERSION = '0.1.0'
