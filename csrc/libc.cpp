// So that the library runs on C libraries older than the one it was compiled with (manylinux_2_28).
//
// libstdc++'s shared_ptr asks __libc_single_threaded, of glibc >= 2.32, whether it may count without atomics. This
// one, seen by this library alone, says that there may be other threads, which is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
