/* Preloaded into every process of a pod: what its network namespace and the cluster's DNS would do.
 *
 * - A listener on every address takes the pod's own alone, on the ports of the pod, so that pods on
 *   one machine do not meet at a port.
 * - Names of the cluster are looked up in a file of lines "ADDRESS NAME"; no other name but this
 *   machine's is, so that nothing leaves it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

static int is_of_the_pod(unsigned port) {
  const char *ports = getenv("POD_NETWORK_PORTS");
  char wanted[16];
  snprintf(wanted, sizeof wanted, ",%u,", port);
  return port && ports && strstr(ports, wanted);
}

int bind(int socket, const struct sockaddr *address, socklen_t length) {
  static int (*real)(int, const struct sockaddr *, socklen_t);
  if (!real) real = (int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "bind");
  const char *own = getenv("POD_NETWORK_ADDRESS");
  if (own && address && address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
    struct sockaddr_in changed = *(const struct sockaddr_in *)address;
    if (changed.sin_addr.s_addr == htonl(INADDR_ANY) && is_of_the_pod(ntohs(changed.sin_port)) &&
        inet_pton(AF_INET, own, &changed.sin_addr) == 1)
      return real(socket, (struct sockaddr *)&changed, sizeof changed);
  }
  if (own && address && address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
    struct sockaddr_in6 changed = *(const struct sockaddr_in6 *)address;
    if (IN6_IS_ADDR_UNSPECIFIED(&changed.sin6_addr) && is_of_the_pod(ntohs(changed.sin6_port))) {
      char mapped[64];
      snprintf(mapped, sizeof mapped, "::ffff:%s", own);
      if (inet_pton(AF_INET6, mapped, &changed.sin6_addr) == 1)
        return real(socket, (struct sockaddr *)&changed, sizeof changed);
    }
  }
  return real(socket, address, length);
}

static int listed(const char *name, char *address, size_t size) {
  const char *path = getenv("POD_NETWORK_NAMES");
  FILE *file = path ? fopen(path, "re") : NULL;
  if (!file) return 0;
  char line[512], this_address[64], this_name[400];
  int found = 0;
  while (!found && fgets(line, sizeof line, file)) {
    if (sscanf(line, "%63s %399s", this_address, this_name) != 2) continue;
    if (strcasecmp(this_name, name) == 0) {
      snprintf(address, size, "%s", this_address);
      found = 1;
    }
  }
  fclose(file);
  return found;
}

/* 1: `address` is the name's; 0: the machine may answer; -1: there is no such name. */
static int resolved(const char *name, char *address, size_t size) {
  struct in6_addr ignored;
  const char *space = getenv("POD_NETWORK_NAMESPACE");
  if (!name || !space || inet_pton(AF_INET, name, &ignored) == 1 ||
      inet_pton(AF_INET6, name, &ignored) == 1)
    return 0;
  char whole[512];
  snprintf(whole, sizeof whole, "%s", name);
  size_t length = strlen(whole);
  if (length && whole[length - 1] == '.') whole[length - 1] = 0;
  const char *domain = "svc.cluster.local";
  char candidates[4][1024];
  snprintf(candidates[0], sizeof candidates[0], "%s", whole);
  snprintf(candidates[1], sizeof candidates[1], "%s.%s.%s", whole, space, domain);
  snprintf(candidates[2], sizeof candidates[2], "%s.%s", whole, domain);
  snprintf(candidates[3], sizeof candidates[3], "%s.cluster.local", whole);
  for (int i = 0; i < 4; i++)
    if (listed(candidates[i], address, size)) return 1;
  char machine[256] = "";
  gethostname(machine, sizeof machine - 1);
  if (!strcasecmp(whole, "localhost") || !strcasecmp(whole, machine)) return 0;
  return -1;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
  static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
  if (!real)
    real = (int (*)(const char *, const char *, const struct addrinfo *, struct addrinfo **))dlsym(
        RTLD_NEXT, "getaddrinfo");
  char address[64];
  int answer = resolved(node, address, sizeof address);
  if (answer < 0) return EAI_NONAME;
  if (answer == 0) return real(node, service, hints, found);
  if (hints && hints->ai_family == AF_INET6 && !(hints->ai_flags & AI_V4MAPPED)) return EAI_NONAME;
  return real(address, service, hints, found);
}
