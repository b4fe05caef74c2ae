/* Included into each file of the interpreter: the one symbol that glibc gave a new version after 2.34. The old one
   differs in errno alone. Without it the packages would need glibc 2.35, which RHEL 9 does not have. */
#if defined(__x86_64__)
__asm__(".symver hypot,hypot@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver hypot,hypot@GLIBC_2.17");
#endif
