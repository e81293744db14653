/* Fails at the n-th event: a write, rename, removal, sync and so on below one folder.
 *
 * Preloaded, it stands between a process and the C library: faults_arm says where, when and how.
 * gcc -shared -fPIC -O2 -o faults.so faults.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { NOTHING, KILL, HALF, EIO_ONCE, ENOSPC_ONCE, ENOSPC_ON, FLIP };
enum kind { OTHER, REMOVAL, WRITE };

static char folder[4096];
static size_t length;
static atomic_long count;
static long target;
static enum action action;
static char kinds[1 << 16];

void faults_arm(const char *where, long event, int what)
{
    strncpy(folder, where, sizeof folder - 1);
    length = strlen(folder);
    atomic_store(&count, 0);
    target = event;
    action = what;
}

long faults_count(void)
{
    return atomic_load(&count);
}

/* What the n-th event was. */
int faults_kind(long event)
{
    return kinds[event];
}

static int is_below(const char *path)
{
    char whole[8192] = "";
    if (!length || !path)
        return 0;
    if (path[0] != '/') {
        if (!getcwd(whole, 4096))
            return 0;
        strcat(whole, "/");
    }
    strncat(whole, path, 4000);
    return strncmp(whole, folder, length) == 0;
}

static int is_open_below(int file)
{
    char link[64], path[4096];
    ssize_t n;
    if (!length || file < 3)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    n = readlink(link, path, sizeof path - 1);
    if (n < 0)
        return 0;
    path[n] = 0;
    return strncmp(path, folder, length) == 0;
}

/* Counts an event; the error that it is to end with, or 0. */
static int fault(enum kind kind)
{
    long now = atomic_fetch_add(&count, 1) + 1;
    kinds[now % sizeof kinds] = kind;
    if (action == KILL && now == target) {
        kill(getpid(), SIGKILL);
        for (;;)
            pause();
    }
    if (action == EIO_ONCE && now == target)
        return EIO;
    /* A full disk still lets files go. */
    if (kind != REMOVAL && ((action == ENOSPC_ONCE && now == target) || (action == ENOSPC_ON && target && now >= target)))
        return ENOSPC;
    return 0;
}

#define REAL(type, name, ...)                                                                      \
    static type (*real)(__VA_ARGS__);                                                              \
    if (!real)                                                                                     \
        real = dlsym(RTLD_NEXT, name);
#define FAIL_IF(below, kind)                                                                       \
    if (below) {                                                                                   \
        int error = fault(kind);                                                                   \
        if (error) {                                                                               \
            errno = error;                                                                         \
            return -1;                                                                             \
        }                                                                                          \
    }

/* Of a write, half may arrive before the end, or all with one bit that is wrong. */
#define WRITES(name, parameters, arguments, half, copy)                                            \
    ssize_t name parameters                                                                        \
    {                                                                                              \
        REAL(ssize_t, #name, TYPES_##name)                                                         \
        if (is_open_below(file)) {                                                                 \
            int is_now = atomic_load(&count) + 1 == target;                                        \
            if (action == HALF && is_now) {                                                        \
                real half;                                                                         \
                kill(getpid(), SIGKILL);                                                           \
                for (;;)                                                                           \
                    pause();                                                                       \
            }                                                                                      \
            FAIL_IF(1, WRITE)                                                                          \
            if (action == FLIP && is_now && n > 0 && n <= sizeof wrong) {                          \
                memcpy(wrong, bytes, n);                                                           \
                wrong[n / 2] ^= 1;                                                                 \
                return real copy;                                                                  \
            }                                                                                      \
        }                                                                                          \
        return real arguments;                                                                     \
    }
static unsigned char wrong[1 << 24];
#define TYPES_write int, const void *, size_t
#define TYPES_pwrite int, const void *, size_t, off_t
#define TYPES_pwrite64 int, const void *, size_t, off_t
WRITES(write, (int file, const void *bytes, size_t n), (file, bytes, n), (file, bytes, n / 2), (file, wrong, n))
WRITES(pwrite, (int file, const void *bytes, size_t n, off_t at), (file, bytes, n, at), (file, bytes, n / 2, at),
       (file, wrong, n, at))
WRITES(pwrite64, (int file, const void *bytes, size_t n, off_t at), (file, bytes, n, at),
       (file, bytes, n / 2, at), (file, wrong, n, at))

ssize_t writev(int file, const struct iovec *parts, int n)
{
    REAL(ssize_t, "writev", int, const struct iovec *, int)
    FAIL_IF(is_open_below(file), WRITE)
    return real(file, parts, n);
}

int fsync(int file)
{
    REAL(int, "fsync", int)
    FAIL_IF(is_open_below(file), OTHER)
    return real(file);
}

int rename(const char *from, const char *to)
{
    REAL(int, "rename", const char *, const char *)
    FAIL_IF(is_below(to), OTHER)
    return real(from, to);
}

int renameat(int a, const char *from, int b, const char *to)
{
    REAL(int, "renameat", int, const char *, int, const char *)
    FAIL_IF(is_below(to), OTHER)
    return real(a, from, b, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags)
{
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned)
    FAIL_IF(is_below(to), OTHER)
    return real(a, from, b, to, flags);
}

int unlink(const char *path)
{
    REAL(int, "unlink", const char *)
    FAIL_IF(is_below(path), REMOVAL)
    return real(path);
}

int unlinkat(int where, const char *path, int flags)
{
    REAL(int, "unlinkat", int, const char *, int)
    FAIL_IF(path[0] == '/' || where == AT_FDCWD ? is_below(path) : is_open_below(where), REMOVAL)
    return real(where, path, flags);
}

int rmdir(const char *path)
{
    REAL(int, "rmdir", const char *)
    FAIL_IF(is_below(path), REMOVAL)
    return real(path);
}

int mkdir(const char *path, mode_t mode)
{
    REAL(int, "mkdir", const char *, mode_t)
    FAIL_IF(is_below(path), OTHER)
    return real(path, mode);
}

int ftruncate(int file, off_t n)
{
    REAL(int, "ftruncate", int, off_t)
    FAIL_IF(is_open_below(file), OTHER)
    return real(file, n);
}

int ftruncate64(int file, off_t n)
{
    REAL(int, "ftruncate64", int, off_t)
    FAIL_IF(is_open_below(file), OTHER)
    return real(file, n);
}

#define OPENS(name, types, parameters, arguments)                                                  \
    int name parameters                                                                            \
    {                                                                                              \
        mode_t mode = 0;                                                                           \
        REAL(int, #name, types, ...)                                                               \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                     \
            va_list more;                                                                          \
            va_start(more, flags);                                                                 \
            mode = va_arg(more, mode_t);                                                           \
            va_end(more);                                                                          \
        }                                                                                          \
        FAIL_IF((flags & (O_WRONLY | O_RDWR | O_CREAT)) && is_below(path), OTHER)                      \
        return real arguments;                                                                     \
    }
#define PLAIN const char *, int
#define AT int, const char *, int
OPENS(open, PLAIN, (const char *path, int flags, ...), (path, flags, mode))
OPENS(open64, PLAIN, (const char *path, int flags, ...), (path, flags, mode))
OPENS(openat, AT, (int where, const char *path, int flags, ...), (where, path, flags, mode))
OPENS(openat64, AT, (int where, const char *path, int flags, ...), (where, path, flags, mode))
