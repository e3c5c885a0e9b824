"""The commands of the command line, a file each; none of them imports torch before it runs."""
